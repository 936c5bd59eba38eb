"""U2A with static shapes leaves as one program: exported, saved, reloaded, equal to eager for batches of any size."""

import io

import parity
import pytest
import tiny_encoders
import torch
from running import on

from u2a_fast import U2A, set_backend

FAMILIES = {
    "pre and post norm": {"image": "vit", "text": "bert"},
    "rotary and windows": {"text": "modernbert", "image": "dinov3"},
    "causal, RMSNorm and shared keys": {"image": "vit_mae", "text": "qwen3"},
}


class Logits(torch.nn.Module):
    """What is exported: the number of samples is the first size of everything that comes in."""

    def __init__(self, model: U2A):
        super().__init__()
        self.model = model

    def forward(self, inputs, modality_mask):
        return self.model(**inputs, modality_mask=modality_mask).logits


@pytest.mark.slow
@pytest.mark.parametrize("name, separate_heads", [*((name, False) for name in FAMILIES), ("pre and post norm", True)])
def test_a_program_of_static_shapes_takes_any_batch(name, separate_heads, device):
    families = FAMILIES[name]
    options = {"absent": "where", "quantization": "int8", "separate_heads": separate_heads}
    model = U2A(tiny_encoders.build_many(families), num_labels=5, **options)
    model = model.double().eval().to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.3)
    batch = torch.export.Dim("batch")
    given = on_device(parity.batch(families, 3), parity.random_presence(3, len(families), 0), device)
    sizes = {name: {key: {0: batch} for key in values} for name, values in given[0].items()}
    file = io.BytesIO()
    torch.export.save(torch.export.export(Logits(model), given, dynamic_shapes=(sizes, {0: batch})), file)
    file.seek(0)
    program = torch.export.load(file).module()
    with torch.no_grad():
        for count in (1, 2, 7):
            inputs, present = on_device(
                parity.batch(families, count, seed=count), parity.random_presence(count, len(families), count), device
            )
            expected = on(device, model)(**inputs, modality_mask=present).logits
            parity.assert_close(program(inputs, present), expected, 1e-9, f"{count} samples")
        with torch.enable_grad():  # as who forgets no_grad calls it
            parity.assert_close(program(inputs, present), expected, 1e-9, "with gradients on")
        nobody = {name: {key: value[:0] for key, value in values.items()} for name, values in given[0].items()}
        assert program(nobody, given[1][:0]).shape == (0, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "families", [FAMILIES[name] for name in ("pre and post norm", "causal, RMSNorm and shared keys")]
)
def test_onnx_takes_the_plain_formulas_and_any_batch(families, tmp_path):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    encoders = tiny_encoders.build_many(families, num_hidden_layers=1)  # each takes ten seconds
    model = U2A(encoders, num_labels=5, absent="where").eval()
    batch = torch.export.Dim("batch")
    given = parity.batch(families, 3, dtype=torch.float32), parity.random_presence(3, len(families), 0)
    sizes = {name: {key: {0: batch} for key in values} for name, values in given[0].items()}
    set_backend("reference")
    program = torch.onnx.export(Logits(model), given, dynamic_shapes=(sizes, {0: batch}), dynamo=True, verbose=False)
    program.save(tmp_path / "u2a.onnx")
    onnx = ReferenceEvaluator(str(tmp_path / "u2a.onnx"))
    for count in (1, 2, 7):
        inputs = parity.batch(families, count, seed=count, padded=True, dtype=torch.float32)
        present = parity.random_presence(count, len(families), count)
        named = {f"inputs_{name}_{key}": t.numpy() for name, values in inputs.items() for key, t in values.items()}
        (logits,) = onnx.run(None, {**named, "modality_mask": present.numpy()})
        with torch.no_grad():
            expected = model(**inputs, modality_mask=present).logits
        parity.assert_close(torch.from_numpy(logits), expected, 1e-5, f"{count} samples")


def on_device(inputs, present, device):
    moved = {name: {key: value.to(device) for key, value in values.items()} for name, values in inputs.items()}
    return moved, present.to(device)
