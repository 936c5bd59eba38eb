"""Cached features are the computed ones; every change that matters is a miss, and no file can do harm."""

import copy
import pickle
from functools import partial

import pytest
import tiny_encoders
import torch
from forks import run_forks
from safetensors.torch import load_file, save_file

from u2a_fast import LoraConfig
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder
from u2a_fast.feature_cache import FeatureCache

FAMILIES = ["vit", "bert", "clip_text", "wav2vec2", "whisper"]


def encoder_of(name="bert", **options):
    return from_pretrained_model(tiny_encoders.build(name, num_hidden_layers=3, **options))


def computed(encoder, layer, inputs):
    with torch.no_grad():
        tokens, mask = encoder.embed(**inputs)
        return encoder.run(tokens, mask, layers=slice(0, layer)), mask


def same(got, expected, limit=1e-5):
    """Equal tokens where they are real, and equal masks."""
    (tokens, mask), (wanted, wanted_mask) = got, expected
    if mask is None or wanted_mask is None:
        return mask is wanted_mask and torch.allclose(tokens, wanted, atol=limit)
    length = mask.shape[1]
    assert not wanted_mask[:, length:].any()
    wanted, wanted_mask = wanted[:, :length], wanted_mask[:, :length]
    return torch.equal(mask, wanted_mask) and torch.allclose(tokens[mask], wanted[mask], atol=limit)


def count(cache, *arguments):
    """(hits, misses) of one lookup."""
    before = cache.hits, cache.misses
    cache.lookup(*arguments)
    return cache.hits - before[0], cache.misses - before[1]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_computed_once_and_then_read(name, layer, tmp_path):
    encoder, inputs = encoder_of(name), tiny_encoders.inputs(name, 4, padded=True)
    expected = computed(encoder, layer, inputs)
    first, cache = FeatureCache(tmp_path), FeatureCache(tmp_path)
    assert same(first.lookup(encoder, layer, inputs), expected)
    assert same(cache.lookup(encoder, layer, inputs), expected)
    assert (first.hits, first.misses, cache.hits, cache.misses) == (0, 4, 4, 0)
    tokens, mask = first.lookup(encoder, layer, inputs)
    again, _ = cache.lookup(encoder, layer, inputs)
    assert torch.equal(tokens, again) and not tokens.requires_grad
    assert mask is None or not tokens[~mask].any()


def test_a_sample_is_the_same_in_any_batch_and_behind_any_padding(tmp_path):
    encoder, inputs = encoder_of("bert"), tiny_encoders.inputs("bert", 4, padded=True)
    cache = FeatureCache(tmp_path)
    whole = cache.lookup(encoder, 2, inputs)
    lengths = inputs["attention_mask"].sum(1)
    for i in (3, 1, 0, 2):
        alone = {name: value[i : i + 1, : lengths[i] + (i == 1)] for name, value in inputs.items()}
        tokens, mask = cache.lookup(encoder, 2, alone)
        assert torch.equal(tokens[0], whole[0][i, : lengths[i]]) and bool(mask.all())
    assert cache.misses == 4


@pytest.mark.parametrize("norm, misses", [("group", 2), ("layer", 1)])
@pytest.mark.parametrize("name", tiny_encoders.SPEECH_FAMILIES)
def test_a_clip_is_what_it_is_in_its_own_batch_where_its_padding_is_heard(name, norm, misses, tmp_path):
    encoder, cache, clip = encoder_of(name, feat_extract_norm=norm).double(), FeatureCache(tmp_path), torch.randn(120)
    for length in (200, 120):
        values, mask = torch.zeros(1, length), torch.zeros(1, length, dtype=torch.long)
        values[:, :120], mask[:, :120] = clip, 1
        inputs = {"input_values": values.double(), "attention_mask": mask}
        assert same(cache.lookup(encoder, 2, inputs), computed(encoder, 2, inputs), 1e-9)
    assert cache.misses == misses


def test_only_what_is_missing_is_run(tmp_path):
    encoder, inputs = encoder_of("vit"), tiny_encoders.inputs("vit", 5)
    cache, seen = FeatureCache(tmp_path), []
    cache.lookup(encoder, 1, {"pixel_values": inputs["pixel_values"][:3]})
    encoder.blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].shape[0]))
    double = {"pixel_values": inputs["pixel_values"][[3, 0, 4, 4, 2]]}
    got = cache.lookup(encoder, 1, double)
    assert seen == [2]  # the fourth sample stands there twice
    assert same(got, computed(encoder, 1, double))


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_no_samples(name, tmp_path):
    inputs = {key: value[:0] for key, value in tiny_encoders.inputs(name, 2, padded=True).items()}
    tokens, _ = FeatureCache(tmp_path).lookup(encoder_of(name), 2, inputs)
    assert tokens.shape[0] == 0 and tokens.shape[2] == tiny_encoders.WIDTH


CHANGES = {
    "content": lambda e, i: (e, {**i, "input_ids": 98 - i["input_ids"]}),
    "another input": lambda e, i: (e, {**i, "token_type_ids": torch.ones_like(i["input_ids"])}),
    "a weight": lambda e, i: (e.blocks[1].fc2.weight.data.mul_(1.01), (e, i))[1],
    "an embedding": lambda e, i: (e.stem["embeddings"].word_embeddings.weight.data.add_(0.1), (e, i))[1],
    "a bias, in place": lambda e, i: (e.blocks[0].o.bias.add_(1), (e, i))[1],
    "dtype": lambda e, i: (e.bfloat16(), i),
    "storage": lambda e, i: (quantize_encoder(e, "int8"), i),
    "int8 inputs": lambda e, i: (quantize_encoder(quantize_encoder(e, "int8"), "int8_w8a8"), i),
    "a frozen adapter": lambda e, i: (e.blocks[0].qkv.add_adapter(LoraConfig()), (e.requires_grad_(False), i))[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_result_is_a_miss(change, tmp_path):
    encoder, inputs, cache = encoder_of("bert"), tiny_encoders.inputs("bert", 3), FeatureCache(tmp_path)
    assert count(cache, encoder, 2, inputs) == (0, 3)
    changed, given = CHANGES[change](copy.deepcopy(encoder), dict(inputs))
    assert count(cache, changed, 2, given) == (0, 3)
    assert same(cache.lookup(changed, 2, given), computed(changed, 2, given))
    assert count(cache, encoder, 2, inputs) == (3, 0)


@pytest.mark.parametrize("option", [{"hidden_act": "relu"}, {"num_attention_heads": 1}, {"layer_norm_eps": 0.1}])
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_equal_weights_under_another_config_are_a_miss(family, option, tmp_path):
    inputs, cache = tiny_encoders.inputs(family, 2), FeatureCache(tmp_path)
    cache.lookup(encoder_of(family), 2, inputs)
    other = encoder_of(family, **option)
    assert count(cache, other, 2, inputs) == (0, 2)
    assert same(cache.lookup(other, 2, inputs), computed(other, 2, inputs))


def test_a_model_of_inference_mode_can_be_cached(tmp_path):
    with torch.inference_mode():
        encoder, inputs, cache = encoder_of("vit"), tiny_encoders.inputs("vit", 2), FeatureCache(tmp_path)
        assert count(cache, encoder, 2, inputs) == (0, 2)
        assert count(cache, encoder, 2, inputs) == (2, 0)


def test_a_change_of_the_same_encoder_is_noticed(tmp_path):
    encoder, inputs, cache = encoder_of("vit"), tiny_encoders.inputs("vit", 2), FeatureCache(tmp_path)
    cache.lookup(encoder, 2, inputs)
    with torch.no_grad():
        encoder.blocks[1].norm1.bias.add_(1)
    assert same(cache.lookup(encoder, 2, inputs), computed(encoder, 2, inputs))
    assert cache.misses == 4


def test_layer_and_autocast_are_part_of_the_key(tmp_path):
    encoder, inputs, cache = encoder_of("vit"), tiny_encoders.inputs("vit", 2), FeatureCache(tmp_path)
    cache.lookup(encoder, 2, inputs)
    assert count(cache, encoder, 1, inputs) == (0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert count(cache, encoder, 2, inputs) == (0, 2)


def test_what_lies_above_the_layer_does_not_matter(tmp_path):
    encoder, inputs, cache = encoder_of("vit"), tiny_encoders.inputs("vit", 2), FeatureCache(tmp_path)
    cache.lookup(encoder, 2, inputs)
    with torch.no_grad():
        encoder.blocks[2].fc1.weight.zero_()
        encoder.stem["final_norm"].bias.add_(1)
    encoder.blocks[2].o.add_adapter(LoraConfig())
    assert count(cache, encoder, 2, inputs) == (2, 0)


def test_a_prefix_that_trains_is_refused(tmp_path):
    encoder, inputs, cache = encoder_of("vit"), tiny_encoders.inputs("vit", 2), FeatureCache(tmp_path)
    encoder.blocks[1].qkv.add_adapter(LoraConfig())
    cache.lookup(encoder, 1, inputs)
    with pytest.raises(ValueError, match=r"blocks.1.qkv.lora_a trains"):
        cache.lookup(encoder, 2, inputs)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "no safetensors": lambda path: path.write_bytes(b"\x93NUMPY" * 50),
    "no checksum": lambda path: save_file(load_file(path), path),
    "other tensors": lambda path: save_file({"x": torch.ones(2)}, path, metadata={"checksum": "0"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_written_again(damage, tmp_path):
    encoder, inputs, cache = encoder_of("bert"), tiny_encoders.inputs("bert", 3), FeatureCache(tmp_path)
    expected = cache.lookup(encoder, 2, inputs)
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    whole = path.read_bytes()
    DAMAGE[damage](path)
    assert path.read_bytes() != whole
    assert same(cache.lookup(encoder, 2, inputs), expected)
    assert cache.misses == 4
    assert count(cache, encoder, 2, inputs) == (3, 0)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    encoder, inputs = encoder_of("bert"), tiny_encoders.inputs("bert", 1)

    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr("u2a_fast.tensor_files.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        FeatureCache(tmp_path).lookup(encoder, 2, inputs)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def look_up(folder, start):
    """In a process of its own: the same samples as the others, in another order; prints how many it computed."""
    encoder, inputs = encoder_of("bert"), tiny_encoders.inputs("bert", 12, padded=True)
    cache = FeatureCache(folder)
    for rows in 3 * torch.arange(12).roll(start).split(3):
        batch = {name: value[rows] for name, value in inputs.items()}
        assert same(cache.lookup(encoder, 2, batch), computed(encoder, 2, batch))
    print(cache.misses)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_shares_the_files(copied, tmp_path):
    encoder, inputs, cache = encoder_of("vit"), tiny_encoders.inputs("vit", 2), FeatureCache(tmp_path)
    cache.lookup(encoder, 2, inputs)
    other = copied(cache)
    assert count(other, encoder, 2, inputs) == (2, 0) and other.misses == 0


@pytest.mark.slow
def test_concurrent_writers_agree(tmp_path):
    outputs = run_forks([partial(look_up, tmp_path, start) for start in (0, 5, 9)], within=120)
    misses = [int(out) for out in outputs]
    assert max(misses) <= 12 <= sum(misses)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 12
    assert not list(tmp_path.rglob("*.part"))
