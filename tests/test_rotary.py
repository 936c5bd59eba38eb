"""Angles are those of the frequencies as they were computed, whatever an encoder is cast to."""

import pytest
import tiny_encoders
import torch
from tolerance import assert_as_exact_as

from u2a_fast.encoders import from_pretrained_model

TEXTS = ["esm_rotary", "modernbert", "nomic_bert", "eurobert", "llama", "qwen3", "gemma3"]
PICTURES = ["dinov3", "dinov3_gated"]


def long_case(name):
    """A model and inputs of hundreds of rows."""
    if name in PICTURES:
        return tiny_encoders.build(name), {"pixel_values": torch.randn(1, 3, 176, 176)}
    return tiny_encoders.build(name, max_position_embeddings=600), {"input_ids": torch.randint(9, 90, (1, 512))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*TEXTS, *PICTURES])
def test_casting_an_encoder_is_loading_it_in_that_dtype(name, dtype, tmp_path):
    model, inputs = long_case(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    cast, expected = from_pretrained_model(model).to(dtype), from_pretrained_model(loaded)
    assert torch.equal(cast(**inputs), expected(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PICTURES)
def test_positions_of_pictures_are_as_exact_as_hugging_faces(name, dtype, tmp_path):
    """Whose module multiplies frequencies in their own dtype."""
    model, inputs = long_case(name)
    model.save_pretrained(tmp_path)
    cast = from_pretrained_model(model).to(dtype)
    with torch.no_grad():
        plain = type(model).from_pretrained(tmp_path, dtype=dtype)(**inputs).last_hidden_state
        exact = model.double()(pixel_values=inputs["pixel_values"].double()).last_hidden_state
        assert_as_exact_as(cast(**inputs), plain, exact, 2)
