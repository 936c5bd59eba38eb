"""PEFT's folders mean the same here and there, both ways, for every family."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny_encoders
import torch
from peft_adapters import adapted, ours, real_rows, rename, targets
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPTextModel
from transformers.integrations import PeftAdapterMixin

from u2a_fast import LoraConfig
from u2a_fast.adapters import adapted_linears, linear_of, low_ranks
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.build import family_of
from u2a_fast.lora_config import ROLES
from u2a_fast.peft_folders import CONFIG, WEIGHTS, load_folder, write_folder

GOLDEN = Path(__file__).parent / "golden" / "transformers4"


def both(folder, name, roles=ROLES, **options):
    """PEFT's model, saved in `folder`, and our encoder that has loaded it, in fp64; and inputs."""
    model = tiny_encoders.build(name).double()
    theirs = adapted(model, **{"target_modules": targets(model, *roles)} | options)
    theirs.save_pretrained(folder)
    encoder = from_pretrained_model(model)
    load_folder(folder, encoder, "text")
    return theirs, encoder.eval(), tiny_encoders.inputs(name, batch=3, padded=True, dtype=torch.float64)


def assert_equal(theirs, encoder, name, inputs):
    with torch.no_grad():
        wanted = tiny_encoders.hidden_states(theirs, name, **inputs)
        found = encoder(**inputs)
        plain = tiny_encoders.hidden_states(tiny_encoders.build(name).double(), name, **inputs)
    base = tiny_encoders.build(name)
    wanted, found, plain = (real_rows(base, name, rows, **inputs) for rows in (wanted, found, plain))
    assert (found - wanted).abs().max() < 1e-9 < 1e-2 < (wanted - plain).abs().max()


# ------------------------------------------------------------------------------------------------------------------ in
def unlike(model):
    """Rank, alpha and scaling that differ among q, k and v, and between layers."""
    family = family_of(model)
    q, v, o = (next(path for path, played in family.linears.items() if role in played) for role in ("q", "v", "o"))
    first = f"{family.layers}.0."
    ranks, alphas = {first + q: 4, rf"{family.layers}\.1\.{o}": 3}, {first + q: 3}
    if v != q:
        ranks[v], alphas[v] = 1, 7
    return {"r": 2, "lora_alpha": 5, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": True}


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_an_adapter_of_peft_gives_its_hidden_states(name, tmp_path):
    theirs, encoder, inputs = both(tmp_path, name, **unlike(tiny_encoders.build(name)))
    assert_equal(theirs, encoder, name, inputs)


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_a_loaded_adapter_gets_the_gradients_that_peft_gives_it(name, tmp_path):
    theirs, encoder, inputs = both(tmp_path, name, r=2, lora_alpha=3)
    base = tiny_encoders.build(name)
    wanted = tiny_encoders.hidden_states(theirs, name, **inputs)
    weight = torch.randn_like(real_rows(base, name, wanted, **inputs))
    (real_rows(base, name, wanted, **inputs) * weight).sum().backward()
    (real_rows(base, name, encoder(**inputs), **inputs) * weight).sum().backward()
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if "lora_" in n}
    family, compared = encoder.family, 0
    for i, block in enumerate(encoder.blocks):
        for path, roles in family.linears.items():
            linear = linear_of(block, roles[0])
            assert linear.lora_a.requires_grad and linear.scaling == 1.5
            a, b = zip(*(gradients_by_role(linear)[role] for role in roles), strict=True)
            for side, found in (("A", sum(a)), ("B", torch.cat(b))):  # one A of several roles has become several
                wanted = gradients[f"{family.layers}.{i}.{path}.lora_{side}.default.weight"]
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
                compared += 1
    assert compared == len(gradients) == 4 * len(family.linears)


def gradients_by_role(linear):
    """{role: (gradient of A, gradient of B)}"""
    of_a = linear.lora_a.grad.chunk(len(linear.adapted))
    of_b = linear.lora_b.grad.split(linear.widths_of(linear.adapted))
    return dict(zip(linear.adapted, zip(of_a, of_b, strict=True), strict=True))


VARIANTS = {
    "q and v": (("q", "v"), {}),
    "k": (("k",), {}),
    "MLP": (("fc1", "fc2"), {}),
    "dropout": (("q", "o"), {"lora_dropout": 0.25}),
    "one layer": (("q",), {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "names": (("q", "v"), {"target_modules": ["query", "value", "attention.output.dense"]}),
    "gaussian": (("q",), {"use_rslora": True, "lora_alpha": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_chose_the_modules(variant, tmp_path):
    roles, options = VARIANTS[variant]
    theirs, encoder, inputs = both(tmp_path, "bert", roles, **options)
    assert_equal(theirs, encoder, "bert", inputs)
    assert {linear.dropout for linear in adapted_linears(encoder).values()} == {options.get("lora_dropout", 0.0)}
    adapted_layers = {name.split(".")[1] for name in adapted_linears(encoder)}
    assert adapted_layers == ({"1"} if variant == "one layer" else {"0", "1"})


@pytest.mark.parametrize("name", ["bert", "vit", "siglip_vision"])
def test_all_linear_loads_and_says_that_the_pooler_is_left_out(name, tmp_path):
    with pytest.warns(UserWarning, match="hidden states do not depend on it"):
        theirs, encoder, inputs = both(tmp_path, name, target_modules="all-linear")
    assert_equal(theirs, encoder, name, inputs)
    assert all(linear.adapted == linear.roles for linear in adapted_linears(encoder).values())


def test_loading_replaces_what_there_was(tmp_path):
    both(tmp_path, "vit", ("q",))
    encoder = ours(tiny_encoders.build("vit"), r=3, target_modules=ROLES)
    load_folder(tmp_path, encoder, "image")
    assert {linear.adapted for linear in adapted_linears(encoder).values()} == {("q",)}
    assert {p.dtype for n, p in encoder.named_parameters() if "lora" in n} == {torch.float32}


@pytest.mark.parametrize("name", ["vit", "clip_text"])
def test_an_adapter_that_transformers_4_saved(name):
    loader = CLIPTextModel if name == "clip_text" else AutoModel
    encoder = from_pretrained_model(loader.from_pretrained(GOLDEN / name))
    load_folder(GOLDEN / name / "adapter", encoder, "image")
    inputs = load_file(GOLDEN / name / "expected.safetensors")
    wanted = inputs.pop("last_hidden_state")
    with torch.no_grad():
        torch.testing.assert_close(encoder(**inputs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, earlier",
    [
        ("bert", "bert.encoder.layer"),
        ("vit", "vit.layers"),
        ("clip_vision", "vision_model.encoder.layers"),
        ("whisper", "model.encoder.layers"),
        ("whisper", "encoder.layers"),
        ("ast", "audio_spectrogram_transformer.encoder.layer"),
        ("distilbert", "distilbert.transformer.layer"),
        ("modernbert", "model.layers"),
        ("qwen3", "model.layers"),
        ("gemma3", "model.language_model.layers"),
        ("dinov3_gated", "layer"),
        ("videomae", "videomae.encoder.layer"),
    ],
)
def test_adapters_of_models_with_a_head_or_another_tower_load(name, earlier, tmp_path):
    theirs, encoder, inputs = both(tmp_path, name)
    tensors = load_file(tmp_path / WEIGHTS)
    rename(tmp_path, lambda key: key.replace(f"model.{encoder.family.layers}.", f"model.{earlier}."))
    assert load_file(tmp_path / WEIGHTS).keys() != tensors.keys()
    again = from_pretrained_model(tiny_encoders.build(name).double())
    load_folder(tmp_path, again, "text")
    assert_equal(theirs, again, name, inputs)


# ----------------------------------------------------------------------------------------------------------------- out
@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_peft_and_transformers_read_what_we_write(name, tmp_path):
    model = tiny_encoders.build(name).double()
    encoder = ours(model, r=3, lora_alpha=5, target_modules=("q", "v", "o", "fc2"))
    write_folder(tmp_path, encoder)
    by_transformers = copy.deepcopy(model)
    PeftAdapterMixin.load_adapter(by_transformers, str(tmp_path))  # Wav2Vec2's own means something else
    inputs = tiny_encoders.inputs(name, batch=3, padded=True, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    for theirs in (by_peft, by_transformers):
        assert_equal(theirs.double().eval(), encoder, name, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_what_came_from_peft_goes_back_to_peft(name, tmp_path):
    theirs, encoder, inputs = both(tmp_path / "in", name, ("q", "v", "o", "fc1"), **unlike(tiny_encoders.build(name)))
    write_folder(tmp_path / "out", encoder)
    again = peft.PeftModel.from_pretrained(tiny_encoders.build(name).double(), tmp_path / "out").double().eval()
    with torch.no_grad():
        wanted, found = (tiny_encoders.hidden_states(model, name, **inputs) for model in (theirs, again))
    base = tiny_encoders.build(name)
    assert (real_rows(base, name, found - wanted, **inputs)).abs().max() < 1e-9
    once_more = from_pretrained_model(tiny_encoders.build(name).double())
    load_folder(tmp_path / "out", once_more, "text")
    assert_equal(theirs, once_more, name, inputs)


def test_the_folder_is_peft_s_and_has_no_pickle(tmp_path):
    encoder = ours(tiny_encoders.build("bert"), r=2, lora_alpha=3, lora_dropout=0.1)
    encoder.name_or_path = "some/bert"
    write_folder(tmp_path, encoder)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 3, 0.1)
    assert config.base_model_name_or_path == "some/bert" and not config.rank_pattern and not config.alpha_pattern
    assert "encoder.layer.0.attention.self.query" in config.target_modules
    keys = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.encoder.layer.1.attention.output.dense.lora_B.weight" in keys and len(keys) == 16


@pytest.mark.parametrize(
    "adapted_roles, shared", [(("q", "k", "v"), True), (("q", "k", "v"), False), (("q", "v"), False)]
)
@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_a_linear_of_several_roles_is_one_module(name, adapted_roles, shared, tmp_path):
    """As in ModernBERT, whose `Wqkv` computes q, k and v; and as if it were so in Qwen3, whose q is wider."""

    def loaded():
        encoder = from_pretrained_model(tiny_encoders.build(name).double())
        others = {role: encoder.family.paths(role) for role in encoder.family.roles if role not in ("q", "k", "v")}
        encoder.family = replace(encoder.family, roles=others | {"qkv": "attn.Wqkv"})
        return encoder

    encoder = loaded()
    for block in encoder.blocks:
        block.qkv.add_adapter(LoraConfig(r=2, target_modules=adapted_roles))
        torch.nn.init.normal_(block.qkv.lora_b)
        if shared:  # as adapters of one module come in
            block.qkv.lora_a.data = block.qkv.lora_a[:2].repeat(3, 1)
    write_folder(tmp_path, encoder.double())
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = (tensors[f"base_model.model.layers.1.attn.Wqkv.lora_{side}.weight"] for side in "AB")
    assert len(tensors) == 4 and a.shape[0] == (2 if shared else 2 * len(adapted_roles))
    qkv = encoder.blocks[1].qkv
    parts, zeros = (
        low_ranks(qkv),
        {role: torch.zeros(width, qkv.in_features) for role, width in zip(qkv.roles, qkv.widths, strict=True)},
    )
    torch.testing.assert_close(b @ a, torch.cat([parts[r].b @ parts[r].a if r in parts else zeros[r] for r in "qkv"]))
    again = loaded()
    load_folder(tmp_path, again, "text")
    inputs = tiny_encoders.inputs(name, batch=2, dtype=torch.float64)
    torch.testing.assert_close(again(**inputs), encoder(**inputs), rtol=0, atol=1e-9)


def test_gate_and_up_of_a_dinov2_before_transformers_5_18_are_one_module(tmp_path):
    encoder = from_pretrained_model(tiny_encoders.build("dinov2_gated"))
    gate_up = encoder.blocks[0].fc1
    factors = {"weights_in": (gate_up.in_features, gate_up.out_features), "weights_out": (gate_up.widths[0], 32)}
    keys = {f"base_model.model.encoder.layer.0.mlp.{name}.lora_{{}}.weight": size for name, size in factors.items()}
    tensors = {key.format("A"): torch.randn(2, size[0]) for key, size in keys.items()}
    tensors |= {key.format("B"): torch.randn(size[1], 2) for key, size in keys.items()}
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 2}')
    save_file(tensors, tmp_path / WEIGHTS)
    load_folder(tmp_path, encoder, "image")
    a, b = (tensors[f"base_model.model.encoder.layer.0.mlp.weights_in.lora_{side}.weight"] for side in "AB")
    for role, own in zip(("gate", "up"), b.chunk(2), strict=True):
        part = low_ranks(gate_up)[role]
        assert torch.equal(part.a, a) and torch.equal(part.b, own) and part.scaling == 4
    assert low_ranks(encoder.blocks[0].fc2).keys() == {"fc2"} and low_ranks(encoder.blocks[1].fc2) == {}
