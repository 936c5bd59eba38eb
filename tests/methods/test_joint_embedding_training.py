"""JointEmbedding trains in the precisions and through the tools that users have, and is what it was once reloaded."""

import parity
import pytest
import tiny_data
import tiny_encoders
import torch
from running import on

from u2a_fast import JointEmbedding, LoraConfig, MultimodalCollator, evaluate, load_model

PAIR = {"image": "vit", "text": "bert"}
THREE = {"image": "deit", "text": "roberta", "audio": "whisper"}
COUNT = 6
LABELS = torch.arange(COUNT) % 5


def test_bitfit_trains_every_bias_of_the_blocks_and_nothing_else_of_the_encoders():
    model = JointEmbedding({m: tiny_encoders.build(f).bfloat16() for m, f in PAIR.items()}, num_labels=5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("encoders.")}
    assert trained == {n for n, _ in model.named_parameters() if ".blocks." in n and n.endswith("bias")}
    assert len(trained) == 2 * 2 * 6  # encoders x layers x (qkv, o, fc1, fc2, two LayerNorms)
    assert all(model.get_parameter(name).dtype == torch.float32 for name in trained)
    rest = [n for n, p in model.named_parameters() if p.requires_grad and n not in trained]
    assert {name.split(".")[0] for name in rest} == {"prompts", "predictor", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["bitfit", LoraConfig(r=2)], ids=["bitfit", "lora"])
def test_bf16_encoders_train_in_fp32_and_weights_stay_bitwise_as_they_were(tuning, device):
    built = {name: tiny_encoders.build(f).bfloat16() for name, f in THREE.items()}
    model = JointEmbedding(built, num_labels=5, tuning=tuning).to(device)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start, optimizer = {n: p.clone() for n, p in trained.items()}, torch.optim.AdamW(trained.values(), 1e-2)
    for step in range(3):
        inputs = parity.batch(THREE, COUNT, step, dtype=torch.float32)
        out = on(device, model)(**inputs, modality_mask=parity.random_presence(COUNT, 3, step), labels=LABELS)
        out.loss.backward()
        assert out.logits.dtype == torch.float32 and out.loss.isfinite()
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != start[name]).any() for name, p in trained.items())
    assert frozen and all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_bf16_bias_gradients_are_those_of_fp32_but_for_rounding(device):
    inputs, gradients = parity.batch(PAIR, COUNT, dtype=torch.float32), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = JointEmbedding({m: tiny_encoders.build(f).to(dtype) for m, f in PAIR.items()}, num_labels=5).to(device)
        on(device, model)(**inputs, labels=LABELS).task_loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and "encoders" in n})
    for name, exact in gradients[0].items():
        got = gradients[1][name]
        # A bias of the keys has no gradient but rounding: it moves all scores of a query alike.
        exact, got = (g.view(3, -1)[[0, 2]] if "qkv" in name else g for g in (exact, got))
        assert torch.nn.functional.cosine_similarity(exact.flatten(), got.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype, device):
    model = JointEmbedding({m: tiny_encoders.build(f) for m, f in PAIR.items()}, num_labels=5).to(device)
    inputs = parity.batch(PAIR, COUNT, dtype=torch.float32)
    plain = on(device, model)(**inputs, labels=LABELS).task_loss
    with torch.autocast(device.type, dtype=dtype):
        out = on(device, model)(**inputs, labels=LABELS)
    out.loss.backward()
    assert (out.task_loss - plain).abs() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_evaluate_reports_every_scenario():
    built = {"text": tiny_encoders.build("bert"), "image": tiny_encoders.build("vit")}
    model = JointEmbedding(built, num_labels=3, processors=tiny_data.processors())
    rows = evaluate(model, tiny_data.samples(6), ["full", "image missing", "rate 0.7"])
    assert [row["n"] for row in rows] == [6, 6, 6]
    assert model.predict([{"text": "red thing"}, {"image": tiny_data.samples(1)[0]["image"]}]).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["bitfit", LoraConfig(r=2, target_modules=("q", "fc1"))], ids=["bitfit", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_reloaded(tmp_path, tuning, dtype):
    folders = tiny_data.encoder_folders(tmp_path)
    loaded = {name: tiny_encoders.build(f).to(dtype) for name, f in (("text", "bert"), ("image", "vit"))}
    for name, encoder in loaded.items():
        encoder.name_or_path = folders[name]
    model = JointEmbedding(loaded, num_labels=3, tuning=tuning, fusion="average", read_only_prompts=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    batch = MultimodalCollator(tiny_data.processors())(tiny_data.samples(4))
    again = load_model(tmp_path / "saved")
    assert isinstance(again, JointEmbedding) and torch.equal(model(**batch).logits, again(**batch).logits)
    handed = JointEmbedding.from_pretrained(tmp_path / "saved", encoders=loaded)
    assert torch.equal(model(**batch).logits, handed(**batch).logits)


@pytest.mark.slow
def test_trainer_trains_and_resumes(tmp_path):
    whole, resumed = tiny_data.whole_and_resumed(lambda folders: JointEmbedding(folders, num_labels=3), tmp_path)
    parameters = zip(whole.named_parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in parameters)
