"""What is no plain LoRA on the linears of an encoder's layers is refused by name, and nothing has changed then."""

import copy
import json
import socket
import time
import warnings

import peft
import pytest
import tiny_encoders
import torch
from peft_adapters import adapted, ours, rename
from safetensors.torch import load_file, save_file

from u2a_fast import peft_folders
from u2a_fast.adapters import describe_adapters
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.peft_folders import CONFIG, WEIGHTS, load_folder


def refused(folder, message, name="bert"):
    """The adapter is refused, in one line, and nothing has changed."""
    encoder = ours(tiny_encoders.build(name), r=2)
    before, described = copy.deepcopy(encoder.state_dict()), describe_adapters(encoder)
    with pytest.raises(ValueError, match=message) as caught:
        load_folder(folder, encoder, "text")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert describe_adapters(encoder) == described and encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["query", "word_embeddings"]}, "lora_embedding_[AB]"),
        ({"target_modules": ["query", "position_embeddings"]}, "lora_embedding_[AB]"),
    ],
)
def test_what_peft_saves_and_we_do_not_compute_is_refused_by_name(options, message, tmp_path):
    adapted(tiny_encoders.build("bert"), **{"target_modules": ["query"]} | options).save_pretrained(tmp_path)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "other",
    [
        peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["query"]),
        peft.OFTConfig(target_modules=["query"], oft_block_size=8),
    ],
)
def test_other_adapters_of_peft_are_refused_by_name(other, tmp_path):
    peft.get_peft_model(tiny_encoders.build("bert"), other).save_pretrained(tmp_path)
    refused(tmp_path, f"peft_type is '{other.peft_type.value}'")


@pytest.mark.parametrize("name, module", [("electra", "embeddings_project"), ("wav2vec2", "feature_projection")])
def test_linears_outside_of_the_layers_are_refused_by_name(name, module, tmp_path):
    adapted(tiny_encoders.build(name), target_modules="all-linear").save_pretrained(tmp_path)
    refused(tmp_path, module, name)


@pytest.fixture
def folder(tmp_path):
    adapted(tiny_encoders.build("bert"), r=2, target_modules=["query", "value"]).save_pretrained(tmp_path)
    return tmp_path


CONFIGS = [
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"something_of_2030": {"x": 1}}, "something_of_2030"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"bias": None}, "bias=None"),
    ({"peft_type": None}, "peft_type is None"),
    ({"r": 3}, "rank 2 in the tensors, and 3 in the config"),
    ({"rank_pattern": {"query": 5}}, "rank 2 in the tensors, and 5"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": True}, "lora_alpha is True"),
    ({"alpha_pattern": {"query": None}}, "pattern 'query' is None"),
    ({"alpha_pattern": {"(": 8}}, "no regular expression"),
    ({"alpha_pattern": {"(a|a)+": 8}}, "too involved"),
    ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
    ({"lora_dropout": None}, "lora_dropout is None"),
]


@pytest.mark.parametrize("change, message", CONFIGS)
def test_configs_that_ask_for_more_are_refused(folder, change, message):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    refused(folder, message)


QUERY = "base_model.model.encoder.layer.1.attention.self.query.lora_{}.weight"
TENSORS = [
    ({QUERY.format("A"): None}, "has the factors B"),
    ({QUERY.format("A"): torch.zeros(3, 32)}, r"A \[3, 32\], B \[32, 2\]"),
    ({QUERY.format("A"): torch.zeros(2, 31)}, "31 inputs and 32 outputs, not 32 and 32"),
    ({QUERY.format("B"): torch.zeros(48, 2)}, "32 inputs and 48 outputs"),
    ({QUERY.format("A"): torch.zeros(0, 32), QUERY.format("B"): torch.zeros(32, 0)}, r"A \[0, 32\]"),
    ({QUERY.format("A"): torch.zeros(2, 32, dtype=torch.int64)}, "int64"),
    ({QUERY.format("A"): torch.zeros(64)}, r"\[64\], not a matrix"),
    ({QUERY.format("magnitude_vector"): torch.zeros(32)}, "lora_magnitude_vector"),
    ({"../../etc/passwd": torch.zeros(1)}, "passwd"),
    ({f"{QUERY.format('A')}".replace("layer.1", "layer.7"): torch.zeros(2, 32)}, "layer.7"),
    ({"": torch.zeros(1)}, "tensor ''"),
]


@pytest.mark.parametrize("change, message", TENSORS)
def test_tensors_that_do_not_fit_are_refused(folder, change, message):
    tensors = load_file(folder / WEIGHTS) | change
    if message == "layer.7":
        tensors[QUERY.format("B").replace("layer.1", "layer.7")] = torch.zeros(32, 2)
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / WEIGHTS)
    refused(folder, message)


def test_one_linear_under_two_names_is_refused(tmp_path):
    adapted(tiny_encoders.build("vit"), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {k.replace("layers", "encoder.layer").replace("q_proj", "attention.query"): t for k, t in tensors.items()}
    assert not old.keys() & tensors.keys()
    save_file(tensors | {key: t.clone() for key, t in old.items()}, tmp_path / WEIGHTS)
    refused(tmp_path, "twice", "vit")


@pytest.mark.parametrize(
    "name, module, message",
    [
        ("qwen3", "k_proj", "layers.0.self_attn.k_proj has 32 inputs and 24 outputs, not 32 and 12"),
        ("modernbert", "Wqkv", "layers.0.attn.Wqkv has 32 inputs and 192 outputs, not 32 and 96"),
    ],
)
def test_an_adapter_of_more_heads_is_refused(name, module, message, tmp_path):
    adapted(tiny_encoders.build(name), r=2, target_modules=[module]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    twice = {key: torch.cat([t, t]) if ".lora_B." in key else t for key, t in tensors.items()}
    save_file(twice, tmp_path / WEIGHTS)
    refused(tmp_path, message, name)


@pytest.mark.parametrize("name, change", [("whisper", ".layers"), ("clip_vision", ".encoder")])
def test_an_adapter_of_another_part_of_the_model_is_refused(name, change, tmp_path):
    adapted(tiny_encoders.build(name), r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    other = {"whisper": ".decoder.layers", "clip_vision": ".text_model.encoder"}[name]
    rename(tmp_path, lambda key: key.replace(f"model{change}", f"model{other}"))
    refused(tmp_path, "it adapts", name)


def test_an_adapter_of_another_family_is_refused(folder):
    refused(folder, "and u2a_fast adapts", "clip_text")
    refused(folder, "and u2a_fast adapts", "whisper")


def test_a_pickle_is_refused_by_name_and_not_read(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin is not read")


@pytest.mark.parametrize("text", ["", "[]", "3", '{"peft_type"', "\xff\xfe", "[" * 100_000])
def test_a_damaged_config_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    refused(folder, "damaged|peft_type")


@pytest.mark.slow
def test_bytes_that_change_anywhere_are_refused_or_load(folder):
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    originals = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    for case in range(300):
        name = (CONFIG, WEIGHTS)[case % 2]
        data = bytearray(originals[name])
        place = int(torch.randint(min(len(data), 1500), (), generator=generator))
        if case % 3:
            data[place] = int(torch.randint(256, (), generator=generator))
        else:
            del data[place:]
        (folder / name).write_bytes(bytes(data))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_folder(folder, from_pretrained_model(tiny_encoders.build("bert")), "text")
            outcomes.add("loaded")
        except ValueError as error:
            assert str(folder) in str(error)
            outcomes.add("refused")
        (folder / name).write_bytes(originals[name])
    assert outcomes == {"loaded", "refused"}


def test_patterns_that_would_run_for_ever_do_not(folder):
    config = json.loads((folder / CONFIG).read_text())
    start = time.monotonic()
    for pattern in ("(.+)+x", "(.|.)*x", ".*.*.*.*.*.*.*.*x", "(a?){30}x", "(((.*)*)*)*x"):
        (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {pattern: 1}}))
        refused(folder, "too involved")
    assert time.monotonic() - start < 20


def test_nothing_but_a_hub_id_is_asked_for_over_the_network(folder, tmp_path, monkeypatch):
    def connect(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    load_folder(folder, from_pretrained_model(tiny_encoders.build("bert")), "text")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no adapter_config.json")
    refused(tmp_path / "nowhere", "no folder of an adapter")
    monkeypatch.chdir(tmp_path)
    refused("../../nowhere", "no folder of an adapter")
    refused(folder / CONFIG, "no folder of an adapter")


@pytest.mark.parametrize("source", [3, None, b"folder"])
def test_what_is_no_name_is_refused_before_anything_is_asked_for(source):
    with pytest.raises(TypeError, match="an adapter is a folder or a hub id, not"):
        load_folder(source, from_pretrained_model(tiny_encoders.build("bert")), "text")


def test_a_hub_id_is_looked_up_itself_and_then_in_the_modality_s_folder(folder, monkeypatch):
    asked = []

    def cached_file(source, name, subfolder, **options):
        asked.append((source, subfolder, name))
        return str(folder / name) if subfolder == "text" else None

    monkeypatch.setattr(peft_folders, "cached_file", cached_file)
    load_folder("me/adapters", from_pretrained_model(tiny_encoders.build("bert")), "text")
    assert asked == [("me/adapters", folder, name) for folder in ("", "text") for name in (CONFIG, WEIGHTS)]
