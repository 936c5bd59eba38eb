"""Quantised encoders compute what their rounded weights say, train beside them, and never change or leave them."""

import copy
import sys

import parity
import pytest
import tiny_encoders
import torch
from running import CPU, moved, on
from transformers import BertModel, BitsAndBytesConfig

from u2a_fast import U2A, LoraConfig, memory
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import mode_of, quantize_encoder
from u2a_fast.kernels import unpack_nf4
from u2a_fast.quantization import MODES, read_quantization

PAIR = {"image": "vit", "text": "bert"}
FAMILIES = ["bert", "vit", "dinov2", "clip_text", "whisper", "modernbert", "qwen3_windows", "gemma3", "dinov3_gated"]


def dequantised(linear, dtype):
    """The rounded weight [N, K] that a quantised linear stands for."""
    if linear.storage == "nf4":
        return unpack_nf4(linear.weight, linear.weight_scale, (linear.out_features, linear.in_features), dtype)
    return (linear.weight.double() * linear.weight_scale.double()[:, None]).to(dtype)


def rounded_twin(encoder):
    """A float encoder with the same rounded weights."""
    twin = copy.deepcopy(encoder)
    for block in twin.blocks:
        for linear in block.linears:
            linear.store(dequantised(linear, encoder.dtype), None)
            linear.quantize_input = False
    return twin


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def build(quantization, dtype=torch.float32, device=CPU, method=U2A, **options):
    torch.manual_seed(0)
    encoders = {name: tiny_encoders.build(family).to(dtype) for name, family in PAIR.items()}
    options = {"lora": LoraConfig(r=2), "modality_dropout": 0.0} | options
    return method(encoders, num_labels=3, quantization=quantization, **options).to(device)


def train(model, steps=2, lr=1e-2, batches=10):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for step in range(steps):
        inputs = parity.batch(PAIR, 4, step % batches, dtype=torch.float32)
        loss = on(model.device, model)(**inputs, labels=torch.arange(4) % 3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return on(model.device, model.eval())(**parity.batch(PAIR, 4, 9, dtype=torch.float32)).logits


# ------------------------------------------------------------------------------------------------------- what is asked
@pytest.mark.parametrize(
    "given, image, text",
    [
        (None, None, None),
        ("nf4", "nf4", "nf4"),
        ({"text": "int8_w8a8"}, None, "int8_w8a8"),
        (BitsAndBytesConfig(load_in_8bit=True), "int8", "int8"),
        ({"image": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "text": None}, "nf4", None),
        (BitsAndBytesConfig(), None, None),
    ],
)
def test_quantization_is_read_per_modality(given, image, text):
    assert read_quantization(given, ("image", "text")) == {"image": image, "text": text}


@pytest.mark.parametrize(
    "given, error, words",
    [
        ("int4", ValueError, "must be one of"),
        ({"audio": "int8"}, ValueError, "audio"),
        (8, TypeError, "not int"),
        (BitsAndBytesConfig(load_in_4bit=True), ValueError, "fp4"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["x"]), ValueError, "llm_int8_skip_modules"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), ValueError, "fp16"),
        (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
            ValueError,
            "double_quant",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        read_quantization(given, ("image", "text"))


def test_a_refusal_leaves_every_encoder_as_it_was():
    pytest.importorskip("bitsandbytes")
    encoders = {name: from_pretrained_model(tiny_encoders.build(family)) for name, family in PAIR.items()}
    quantize_encoder(encoders["text"], "int8")
    with pytest.raises(ValueError, match="stored as int8 already"):
        U2A(encoders, num_labels=3, quantization="nf4")
    assert mode_of(encoders["image"]) is None and mode_of(encoders["text"]) == "int8"


def test_nf4_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install u2a-fast\[bnb\]"):
        build("nf4")


# --------------------------------------------------------------------------------------------------- what is computed
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_only_the_linears_of_the_blocks_are_quantised(name, mode, device):
    encoder = from_pretrained_model(tiny_encoders.build(name)).to(device)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    quantize_encoder(encoder, mode)
    weights = {f"blocks.{i}.{role}.weight" for i in range(2) for role in ("qkv", "o", "fc1", "fc2")}
    after = encoder.state_dict()
    assert {key for key in after if key not in before} == {f"{key}_scale" for key in weights}
    assert all(torch.equal(after[key], before[key]) for key in before if key not in weights)
    assert {after[key].dtype for key in weights} == {torch.uint8 if mode == "nf4" else torch.int8}
    assert {after[f"{key}_scale"].dtype for key in weights} == {torch.float32}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert mode_of(encoder) == mode


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_hidden_states_are_those_of_the_rounded_weights(mode, name, dtype, limit, device):
    encoder = quantize_encoder(from_pretrained_model(tiny_encoders.build(name).to(dtype)), mode).to(device)
    inputs = moved(tiny_encoders.inputs(name, 3, padded=True), device)
    with torch.no_grad():
        got, twin, exact = (run(**inputs) for run in (encoder, rounded_twin(encoder), rounded_twin(encoder).double()))
    assert relative(got, twin) < limit or (device.type == "cuda" and relative(got, exact) < 2 * relative(twin, exact))


@pytest.mark.parametrize("mode, limit", [("int8", 0.04), ("int8_w8a8", 0.10)])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_close_to_fp32(mode, limit, name, device):
    plain = from_pretrained_model(tiny_encoders.build(name))
    encoder, inputs = quantize_encoder(copy.deepcopy(plain).to(device), mode), tiny_encoders.inputs(name, 3)
    with torch.no_grad():
        assert 0 < relative(on(device, encoder)(**inputs), plain(**inputs)) < limit


def test_w8a8_rounds_its_input_and_w8a16_does_not(device):
    encoder = from_pretrained_model(tiny_encoders.build("vit")).to(device)
    inputs = moved(tiny_encoders.inputs("vit", 3), device)
    with torch.no_grad():
        w8a16 = quantize_encoder(encoder, "int8")(**inputs)
        w8a8 = quantize_encoder(encoder, "int8_w8a8")(**inputs)
    assert relative(w8a8, w8a16) > 1e-3


@pytest.mark.real
@pytest.mark.parametrize("mode, limit", [("int8", 0.04), ("int8_w8a8", 0.10)])
@pytest.mark.parametrize("name", ["image", "text", "audio"])
def test_real_encoders_are_close_to_fp32_and_to_their_rounded_weights(name, mode, limit):
    plain, inputs = real_encoder(name)
    encoder = quantize_encoder(copy.deepcopy(plain), mode)
    narrow = quantize_encoder(copy.deepcopy(plain).bfloat16(), mode)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    with torch.no_grad():
        expected, got, rounded = (e(**inputs)[real] for e in (plain, encoder, rounded_twin(encoder)))
        assert relative(got, expected) < limit
        assert relative(narrow(**inputs)[real], expected) < limit
        assert mode != "int8" or relative(got, rounded) < 0.01


def real_encoder(name):
    """A pretrained encoder and inputs of the kind that it knows: emoji, their names, and a gated buzz."""
    from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from u2a_fast.data import MultimodalCollator, pretrained
    from u2a_fast.data.emoji import load_emoji

    if name == "audio":
        folder, time = pretrained.whisper_folder(), torch.arange(48_000) / 16_000
        buzz = (800 * time + 3 * (19 * time).sin()).sin() * ((12 * time).sin() > 0) * 0.3
        wave = buzz + 0.01 * torch.randn(len(time), generator=torch.Generator().manual_seed(0))
        inputs = AutoFeatureExtractor.from_pretrained(folder)(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
        return from_pretrained_model(WhisperEncoder.from_pretrained(folder)), {
            "input_features": inputs["input_features"]
        }
    folder = {"image": pretrained.dinov2_folder, "text": pretrained.minilm_folder}[name]()
    processor = {"image": AutoImageProcessor, "text": AutoTokenizer}[name].from_pretrained(folder)
    rows = load_emoji()["test"].select(range(0, 400, 50))
    batch = MultimodalCollator({name: processor})([{name: row[name]} for row in rows])
    return from_pretrained_model(AutoModel.from_pretrained(folder)), batch[name]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("roles", [("q", "k", "v", "o"), ("v", "fc1", "fc2")])
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_gradients_are_those_of_the_rounded_weights(mode, roles, dropout, device):
    model = build(mode, device=device, lora=LoraConfig(r=2, target_modules=roles, lora_dropout=dropout)).train()
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(model)
    for name, encoder in model.encoders.items():
        twin.encoders[name] = rounded_twin(encoder)
    inputs = parity.batch(PAIR, 4, dtype=torch.float32)
    for each in (model, twin):
        torch.manual_seed(1)
        on(device, each)(**inputs, labels=torch.arange(4) % 3).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and any("lora_a" in name for name in gradients)
    assert all(relative(g, expected[name]) < 1e-4 for name, g in gradients.items() if expected[name].abs().max() > 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_samples_without_a_modality_train(mode, device):
    model, inputs = build(mode, device=device).train(), parity.batch(PAIR, 4, dtype=torch.float32)
    present = torch.tensor([[True, False]] * 4)
    with torch.autocast(device.type, torch.bfloat16):
        out = on(device, model)(**inputs, modality_mask=present, labels=torch.arange(4) % 3)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and torch.isfinite(g).all() for n, g in gradients.items() if "mask_token" not in n)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_size_of_a_weight_is_kept_for_backward(mode, device):
    """One sample of few rows, so that any copy of a weight would outweigh all activations."""
    model = build(mode).train()
    model.encoders = torch.nn.ModuleDict(
        {"image": from_pretrained_model(tiny_encoders.build("vit", hidden_size=256, intermediate_size=1024))}
    )
    block = quantize_encoder(model.encoders["image"], mode).blocks[0].to(device)
    for linear in block.linears:
        linear.add_adapter(LoraConfig(r=2))
    x = moved(torch.randn(1, 3, 256), device).requires_grad_()
    assert memory.saved_bytes(lambda: block(x), block.parameters()) < 256 * 256


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_tensors_stay_bitwise_the_same_through_training(mode, dtype, device):
    model = build(mode, dtype, device)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not model.get_parameter(n).requires_grad}
    train(model)
    logits(model)
    assert len(frozen) > 40
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_adapters_learn_beside_quantised_weights(mode, device):
    losses = train(build(mode, device=device), steps=8, lr=3e-2, batches=1)
    assert losses[-1] < 0.8 * losses[0]


# ------------------------------------------------------------------------------------------------ stored and moved
@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.half().float()])
@pytest.mark.parametrize("mode", MODES)
def test_changing_the_dtype_changes_neither_int8_nor_scales(mode, move, device):
    encoder = quantize_encoder(from_pretrained_model(tiny_encoders.build("vit")), mode).to(device)
    before = {n: t.clone() for n, t in encoder.state_dict().items() if "weight_scale" in n or t.itemsize == 1}
    after = move(encoder).state_dict()
    assert len(before) == 16
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_deepcopy_state_dict_and_files_are_exact(mode, tmp_path, device):
    model = build(mode, device=device)
    train(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    other = build(mode, device=device)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    model.save_pretrained(tmp_path)
    encoders = {name: tiny_encoders.build(family) for name, family in PAIR.items()}
    loaded = U2A.from_pretrained(tmp_path, encoders=encoders).to(device)
    assert loaded.config.arguments["quantization"] == {"image": mode, "text": mode}
    assert torch.equal(logits(loaded), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_resumed_training_continues_exactly(mode, tmp_path):
    straight = train(build(mode), steps=4)
    model = build(mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(4):
        if step == 2:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
            state = torch.load(tmp_path / "state", weights_only=True)
            model = build(mode)
            model.load_state_dict(state["model"])
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
            optimizer.load_state_dict(state["optimizer"])
        loss = model.train()(**parity.batch(PAIR, 4, step, dtype=torch.float32), labels=torch.arange(4) % 3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == straight


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("source, target", [(None, "int8"), ("int8", None), ("int8", "nf4"), ("nf4", "int8_w8a8")])
def test_a_state_dict_of_another_storage_is_an_error(source, target, strict):
    with pytest.raises(RuntimeError, match="build the model with the quantization"):
        build(target).load_state_dict(build(source).state_dict(), strict=strict)


@pytest.mark.parametrize("override", [None, "int8_w8a8", "nf4", {"image": "int8"}])
def test_trained_files_load_onto_any_storage(override, tmp_path):
    model = build("int8")
    train(model)
    model.save_pretrained(tmp_path)
    encoders = {name: tiny_encoders.build(family) for name, family in PAIR.items()}
    loaded = U2A.from_pretrained(tmp_path, encoders=encoders, quantization=override)
    wanted = read_quantization(override, PAIR)
    assert {name: mode_of(encoder) for name, encoder in loaded.encoders.items()} == wanted
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(dict(loaded.named_parameters())[name], p) for name, p in trained.items())


@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_counted_as_weights_not_as_bytes(mode):
    assert build(mode).get_nb_trainable_parameters() == build(None).get_nb_trainable_parameters()


# -------------------------------------------------------------------------------------------- loaded by bitsandbytes
@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("bert")
    tiny_encoders.build("bert").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("used", [False, True])
def test_an_encoder_that_bitsandbytes_loaded_is_taken_as_it_is(saved_bert, used):
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = BertModel.from_pretrained(saved_bert, quantization_config=config, dtype=torch.float32)
    if used:  # the first forward moves the scales
        with torch.no_grad():
            model(**tiny_encoders.inputs("bert", 2))
    encoder = from_pretrained_model(model)
    query = model.encoder.layer[1].attention.self.query
    scb = query.weight.SCB if query.weight.SCB is not None else query.state.SCB
    qkv = encoder.blocks[1].qkv
    assert type(qkv.weight) is torch.nn.Parameter and torch.equal(qkv.weight[:32], query.weight.data)
    assert torch.equal(qkv.weight_scale[:32], scb.float() / 127)
    inputs = tiny_encoders.inputs("bert", 3)
    with torch.no_grad():
        plain = from_pretrained_model(tiny_encoders.build("bert"))(**inputs)
        assert 0 < relative(encoder(**inputs), plain) < 0.04
    u2a = U2A({"text": encoder, "image": tiny_encoders.build("vit")}, num_labels=3)
    assert u2a.config.arguments["quantization"] == {"text": "int8", "image": None}


@pytest.mark.parametrize("override", [{}, {"quantization": "int8_w8a8"}, {"quantization": None}])
def test_a_model_on_what_bitsandbytes_loaded_comes_back_on_the_same_rows(saved_bert, override, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    text = BertModel.from_pretrained(saved_bert, quantization_config=config, dtype=torch.float32)
    model = U2A({"image": tiny_encoders.build("vit"), "text": text}, num_labels=3, lora=LoraConfig(r=2))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = U2A.from_pretrained(tmp_path, encoders={"image": tiny_encoders.build("vit")}, **override)
    assert mode_of(loaded.encoders["text"]) == override.get("quantization", "int8")
    rows, scales = (getattr(loaded.encoders["text"].blocks[1].fc1, name) for name in ("weight", "weight_scale"))
    if override == {"quantization": None}:
        assert rows.is_floating_point()
    else:
        fc1 = model.encoders["text"].blocks[1].fc1
        assert torch.equal(rows, fc1.weight) and torch.equal(scales, fc1.weight_scale)
    assert override or torch.equal(logits(loaded), logits(model))


def test_an_encoder_loaded_in_4_bit_is_refused(saved_bert):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = BertModel.from_pretrained(saved_bert, quantization_config=config, dtype=torch.float32)
    with pytest.raises(ValueError, match="load in floating point"):
        from_pretrained_model(model)
