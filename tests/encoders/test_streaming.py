"""An encoder that is read block by block is the one that is loaded whole and quantised, and never needs its memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_configs
import tiny_encoders
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_data import encoder_folders
from transformers import BertModel, BitsAndBytesConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from u2a_fast import U2A, LoraConfig
from u2a_fast.encoders import Encoder, from_pretrained_model, load, load_encoder, streaming
from u2a_fast.encoders.frozen import mode_of, quantize_encoder
from u2a_fast.methods import loading

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers4"
CONVERTED = ("nomic_bert", "dinov2_gated")  # transformers, or a later one, splits their weights as it loads them
WITHOUT_AUTO = ("siglip_text", "siglip2_text")  # no folder of theirs can be loaded: of a model with two towers they can
FAMILIES = [name for name in tiny_encoders.FAMILIES if name not in WITHOUT_AUTO]


@pytest.fixture
def whole(monkeypatch):
    """The loads of whole models by `load_encoder`."""
    loads = []

    def noted(*args, **options):
        loads.append(args)
        return load(*args, **options)

    monkeypatch.setattr(streaming, "load", noted)
    return loads


def modality_of(name):
    return "text" if name in tiny_encoders.TEXT_FAMILIES else "image"


def loaded_whole(folder, modality, mode, **options):
    torch.manual_seed(0)
    return quantize_encoder(from_pretrained_model(load(str(folder), modality, **options)), mode)


def loaded(folder, modality, mode, **options):
    torch.manual_seed(0)
    return load_encoder(str(folder), modality, mode, **options)


def assert_same(one: Encoder, other: Encoder):
    """All that two encoders hold and say of themselves, bit for bit."""
    for tensors, expected in (
        (dict(one.named_parameters()), dict(other.named_parameters())),
        (dict(one.named_buffers()), dict(other.named_buffers())),
        (one.origin.kept, other.origin.kept),
    ):
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].dtype == tensor.dtype for name, tensor in expected.items())
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert not any(p.requires_grad for p in one.parameters())
    assert repr(one) == repr(other)
    assert one.origin.model_class is other.origin.model_class
    assert one.config.to_dict() == other.config.to_dict()
    for name in ("name_or_path", "training", "loaded_in_8bit", "dtype", "family"):
        assert getattr(one, name) == getattr(other, name)


# --------------------------------------------------------------------------------------------------- the same encoder
@pytest.mark.parametrize("mode, dtype", [("nf4", torch.float32), ("int8", torch.bfloat16), ("nf4", torch.bfloat16)])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_encoder_that_is_loaded_whole(name, mode, dtype, tmp_path, whole):
    tiny_encoders.build(name).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    encoder = loaded(tmp_path, modality_of(name), mode, dtype=dtype)
    expected = loaded_whole(tmp_path, modality_of(name), mode, dtype=dtype)
    assert not whole or name in CONVERTED
    assert_same(encoder, expected)
    inputs = tiny_encoders.inputs(name, 2)
    with torch.no_grad():
        assert torch.equal(encoder(**inputs), expected(**inputs))


@pytest.mark.parametrize("mode", ["int8", "int8_w8a8", "nf4"])
def test_one_file_is_read_as_several_are_and_in_the_dtype_that_it_has(mode, tmp_path, whole):
    model = tiny_encoders.build("qwen3").bfloat16()
    for folder, size in (("one", "1GB"), ("several", "30KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
    one, several = (loaded(tmp_path / folder, "text", mode) for folder in ("one", "several"))
    assert not whole and one.dtype == torch.bfloat16 and mode_of(one) == mode
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))
    assert_same(one, loaded_whole(tmp_path / "one", "text", mode))


@pytest.mark.parametrize(
    "name, head",
    [
        ("bert", "BertForMaskedLM"),
        ("roberta", "RobertaForSequenceClassification"),
        ("modernbert", "ModernBertForMaskedLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("vit", "ViTForImageClassification"),
        ("wav2vec2", "Wav2Vec2ForCTC"),
    ],
)
def test_a_checkpoint_of_a_model_with_a_head_gives_its_encoder(name, head, tmp_path, whole):
    _, config_class, settings = tiny_configs.CONFIGS[name]
    model = getattr(transformers, head)(config_class(**settings))
    tiny_encoders.randomize(model)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert_same(loaded(tmp_path, modality_of(name), "nf4"), loaded_whole(tmp_path, modality_of(name), "nf4"))
    assert not whole


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("build, name", [((CLIPModel, CLIPConfig), "clip"), ((SiglipModel, SiglipConfig), "siglip")])
def test_a_tower_is_read_from_a_checkpoint_of_two(build, name, modality, tmp_path, whole):
    model_class, config_class = build
    towers = (tiny_configs.CONFIGS[f"{name}_{tower}"][2] for tower in ("text", "vision"))
    config = config_class(**dict(zip(("text_config", "vision_config"), towers, strict=True)))
    model_class(config).save_pretrained(tmp_path)
    assert_same(loaded(tmp_path, modality, "nf4"), loaded_whole(tmp_path, modality, "nf4"))
    assert not whole


@pytest.mark.parametrize("name, modality", [("vit", "image"), ("clip_text", "text")])
def test_names_of_an_earlier_transformers_are_found(name, modality, whole):
    encoder = loaded(GOLDEN / name, modality, "nf4")
    assert_same(encoder, loaded_whole(GOLDEN / name, modality, "nf4"))
    assert not whole


@pytest.mark.slow
def test_a_model_of_names_streams_built_saved_and_loaded(tmp_path, whole):
    folders = encoder_folders(tmp_path)
    model = U2A(folders, num_labels=3, lora=LoraConfig(r=2), quantization={"text": "nf4", "image": "int8"})
    assert not whole
    for name, mode in (("text", "nf4"), ("image", "int8")):
        expected = loaded_whole(folders[name], name, mode)
        frozen = dict(model.encoders[name].named_parameters())
        assert all(torch.equal(frozen[key], tensor) for key, tensor in expected.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    again = U2A.from_pretrained(tmp_path / "saved")
    assert not whole
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_reported_of_the_layers(tmp_path, caplog):
    tiny_encoders.build("bert").save_pretrained(tmp_path)
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        loaded(tmp_path, "text", "nf4")
    finally:
        logger.removeHandler(caplog.handler)
    assert "encoder.layer" not in caplog.text


# --------------------------------------------------------------------------------------------------- as a whole, then
def test_values_that_are_missing_are_drawn_as_transformers_draws_them(tmp_path, whole):
    tiny_encoders.build("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert_same(loaded(tmp_path, "text", "nf4"), loaded_whole(tmp_path, "text", "nf4"))
    assert len(whole) == 1


def test_a_checkpoint_that_bitsandbytes_wrote_stays_as_it_is(tmp_path, whole):
    pytest.importorskip("bitsandbytes")
    tiny_encoders.build("bert").save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_8bit=True)
    BertModel.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(tmp_path / "int8")
    encoder = loaded(tmp_path / "int8", "text", "int8")
    assert len(whole) == 1 and encoder.loaded_in_8bit and mode_of(encoder) == "int8"


def _remove(folder):
    (folder / "model.safetensors").unlink()


def _pickle(folder):
    _remove(folder)
    torch.save({}, folder / "pytorch_model.bin")


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))


def _of_another_family(folder):
    settings = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    transformers.T5EncoderModel(transformers.T5Config(**settings)).save_pretrained(folder)


@pytest.mark.parametrize("change", [_remove, _pickle, _cut, _widen, _of_another_family])
def test_what_cannot_be_loaded_is_refused_in_the_same_words(change, tmp_path):
    tiny_encoders.build("bert").save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as expected:
        loaded_whole(tmp_path, "text", "nf4")
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        loaded(tmp_path, "text", "nf4")


def test_without_a_mode_nothing_changes(tmp_path, whole):
    tiny_encoders.build("vit").save_pretrained(tmp_path)
    encoder = loading.as_encoder("image", str(tmp_path), None, None)
    assert len(whole) == 1 and mode_of(encoder) is None


# ------------------------------------------------------------------------------------------------------------- memory
PEAK = """
import re, sys, tempfile
import torch
from transformers import Qwen3Config, Qwen3Model
from u2a_fast.encoders import load_encoder

def resident(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

folder, mode, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
with tempfile.TemporaryDirectory() as small:  # imports, and whatever else a first time takes
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    Qwen3Model(Qwen3Config(vocab_size=9, num_key_value_heads=1, head_dim=64, **sizes)).save_pretrained(small)
    load_encoder(small, "text", mode, dtype=dtype)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the peak, starts anew
encoder = load_encoder(folder, "text", mode, dtype=dtype)
print(resident("VmHWM") - before, sum(t.numel() * t.itemsize for t in [*encoder.parameters(), *encoder.buffers()]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Qwen3 of 220 MB in ten files."""
    folder = tmp_path_factory.mktemp("large")
    sizes = dict(hidden_size=640, num_hidden_layers=12, num_attention_heads=10, intermediate_size=1792)
    config = transformers.Qwen3Config(vocab_size=2000, num_key_value_heads=5, head_dim=64, **sizes)
    transformers.Qwen3Model(config).save_pretrained(folder, max_shard_size="30MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux")
@pytest.mark.parametrize("mode, dtype", [("nf4", "float32"), ("int8", "bfloat16")])
def test_loading_takes_what_is_stored_and_one_layer(mode, dtype, large):
    """At most 1.2 x the stored bytes and a layer in the dtype that is asked for; the checkpoint would not fit.

    glibc maps every tensor here, as it does by itself from 32 MB on, so that the allocator's holes are not measured.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(large), mode, dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, stored = map(int, run.stdout.split())
    layer = (640 * 64 * (10 + 10 + 5 + 5) + 3 * 640 * 1792) * getattr(torch, dtype).itemsize
    limit = 1.2 * stored + layer
    files = list(large.glob("*.safetensors"))
    assert len(files) > 5 and sum(file.stat().st_size for file in files) > 2 * limit
    assert 0.8 * stored < peak < limit
