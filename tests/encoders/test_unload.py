"""The way back from an `Encoder` is the Hugging Face model that it came from, with what was trained merged into it."""

import copy

import pytest
import tiny_encoders
import torch
from transformers import AutoModel, BertModel, BitsAndBytesConfig

from u2a_fast import LoraConfig
from u2a_fast.encoders import Encoder, from_pretrained_model
from u2a_fast.encoders.frozen import add_adapters, quantize_encoder
from u2a_fast.encoders.unload import unload
from u2a_fast.lora_config import ROLES
from u2a_fast.methods.joint_embedding import train_biases


def adapted(model, roles=ROLES):
    encoder = from_pretrained_model(model)
    add_adapters([encoder], LoraConfig(r=3, lora_alpha=2, target_modules=roles))
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.to(model.dtype)


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_without_adapters_it_is_the_same_model(name):
    model = tiny_encoders.build(name)
    model.name_or_path = "somewhere"
    encoder = from_pretrained_model(model)
    back = unload(copy.deepcopy(encoder))
    assert type(back) is type(model) and back.name_or_path == "somewhere" and not back.training
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {**dict(back.named_parameters()), **dict(back.named_buffers())}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(parameter.requires_grad for parameter in back.parameters())
    shared = {p.data_ptr() for p in encoder.parameters()} & {p.data_ptr() for p in back.parameters()}
    assert not shared - {0}


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_merged_hidden_states_are_the_adapted_ones(name):
    model = tiny_encoders.build(name).double()
    encoder = adapted(model)
    inputs = tiny_encoders.inputs(name, batch=3, padded=True, dtype=torch.float64)
    with torch.no_grad():
        found = tiny_encoders.hidden_states(unload(encoder), name, **inputs)
        difference, plain = (encoder(**inputs) - found).abs(), tiny_encoders.hidden_states(model, name, **inputs)
    real = tiny_encoders.token_mask(model, name, **inputs)
    if real is not None:
        difference, found, plain = difference[real], found[real], plain[real]
    assert difference.max() < 1e-9 < 1e-2 < (found - plain).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, "int8", "nf4"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3"])
def test_weights_in_any_storage_come_back_in_the_dtype_of_the_encoder(name, mode, dtype):
    model = tiny_encoders.build(name)
    encoder = quantize_encoder(adapted(model, ("q", "v", "o")).to(dtype), mode)
    inputs = tiny_encoders.inputs(name, batch=3)
    back = unload(encoder)
    assert {parameter.dtype for parameter in back.parameters()} == {dtype}  # the pooler's too
    with torch.no_grad():
        found, wanted = back(**inputs).last_hidden_state.double(), encoder(**inputs).double()
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert (found - wanted).norm() / wanted.norm() < limit


def with_trained_biases(name):
    encoder = from_pretrained_model(tiny_encoders.build(name).double())
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data += torch.linspace(-0.5, 0.5, len(parameter)).double()
    return encoder


@pytest.mark.parametrize("name", ["whisper", "data2vec_vision", "dinov3_gated"])
def test_what_trained_beside_adapters_comes_along(name):
    """Their keys have no bias, which changes nothing but in DINOv3, where positions turn it."""
    encoder = with_trained_biases(name)
    inputs = tiny_encoders.inputs(name, batch=2, dtype=torch.float64)
    back = unload(encoder)
    with torch.no_grad():
        assert (tiny_encoders.hidden_states(back, name, **inputs) - encoder(**inputs)).abs().max() < 1e-9
    assert getattr(encoder.config, "key_bias", False) is False  # the caller's


def test_a_bias_that_the_model_has_no_place_for_is_refused():
    encoder = with_trained_biases("whisper")
    encoder.blocks[0].heads = encoder.blocks[0].heads._replace(rotary="all")
    with pytest.raises(ValueError, match=r"no bias at self_attn.k_proj, where this encoder has trained one"):
        unload(encoder)


@pytest.mark.parametrize("change", ["adapters", "frozen adapters", "biases", "int8", "nf4"])
def test_where_weights_are_others_it_is_called_by_no_name(change):
    """A model built on it would be saved with that name, and read from there without what was trained."""
    model = tiny_encoders.build("bert")
    model.name_or_path = "somewhere"
    encoder = from_pretrained_model(model)
    if "adapters" in change:
        add_adapters([encoder], LoraConfig(r=3))
        encoder.requires_grad_(change == "adapters")
    elif change == "biases":
        train_biases([encoder])
    else:
        quantize_encoder(encoder, change)
    assert unload(encoder).name_or_path == ""


def test_it_saves_and_loads_as_any_model_does(tmp_path):
    encoder = adapted(tiny_encoders.build("vit"))
    unload(encoder).save_pretrained(tmp_path)
    inputs = tiny_encoders.inputs("vit", batch=2)
    with torch.no_grad():
        loaded, wanted = AutoModel.from_pretrained(tmp_path)(**inputs).last_hidden_state, encoder(**inputs)
    torch.testing.assert_close(loaded, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "electra", "modernbert", "qwen3"])
def test_what_bitsandbytes_had_quantised_comes_back_plain(name, tmp_path):
    """ELECTRA has a linear in its embedding stage, BERT one in its pooler."""
    pytest.importorskip("bitsandbytes")
    source = tiny_encoders.build(name)
    source.save_pretrained(tmp_path / "source")
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = type(source).from_pretrained(tmp_path / "source", quantization_config=config, dtype=torch.float32)
    encoder = from_pretrained_model(model)
    back = unload(encoder)
    assert {type(m) for m in back.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    inputs = tiny_encoders.inputs(name, batch=2)
    back.save_pretrained(tmp_path / "back")
    again = type(source).from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        wanted, found = source(**inputs).last_hidden_state, again(**inputs).last_hidden_state
        assert (found - wanted).norm() / wanted.norm() < 0.04
        torch.testing.assert_close(encoder(**inputs), found, rtol=0, atol=1e-4)
        if isinstance(source, BertModel):
            wanted, found = source(**inputs).pooler_output, again(**inputs).pooler_output
            assert (found - wanted).norm() / wanted.norm() < 0.05


def test_an_encoder_put_together_by_hand_has_no_way_back():
    encoder = from_pretrained_model(tiny_encoders.build("vit"))
    by_hand = Encoder(encoder.family, encoder.config, encoder.stem, [*encoder.blocks], encoder.rotary)
    with pytest.raises(ValueError, match="put together by hand"):
        unload(by_hand)
