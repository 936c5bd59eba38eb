"""Odd widths, heads and windows, and every scaling of rotary positions that is read, equal Hugging Face."""

from functools import partial

import pytest
import tiny_encoders
import torch
from running import CPU, moved, on

from u2a_fast.encoders import from_pretrained_model
from u2a_fast.padding import padding_of
from u2a_fast.reference import ReferenceEncoder

ROPE = {"rope_theta": 50.0, "factor": 3.0, "original_max_position_embeddings": 6}
SIZES = [
    ("distilbert", dict(hidden_size=24, num_attention_heads=1)),
    ("esm_rotary", dict(hidden_size=30, num_attention_heads=5)),
    ("modernbert", dict(hidden_size=30, num_attention_heads=3, local_attention=2, num_hidden_layers=3)),
    ("modernbert", dict(global_attn_every_n_layers=1, attention_bias=True, mlp_bias=True, norm_bias=False)),
    ("nomic_bert", dict(hidden_size=36, num_attention_heads=6, head_dim=4, num_hidden_layers=1)),
    ("eurobert", dict(hidden_size=33, num_attention_heads=3, num_key_value_heads=3, head_dim=14, attention_bias=True)),
    ("llama", dict(hidden_size=72, num_attention_heads=6, num_key_value_heads=3, head_dim=2, intermediate_size=7)),
    ("llama", dict(rope_parameters=ROPE | {"rope_type": "linear"})),
    ("llama", dict(rope_parameters=ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0})),
    ("qwen3", dict(rope_parameters=ROPE | {"rope_type": "yarn"})),
    ("qwen2", dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=2)),
    ("mistral", dict(sliding_window=1, num_key_value_heads=4)),
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=2)),
    ("qwen3_windows", dict(num_hidden_layers=3, sliding_window=5, max_window_layers=0)),
    ("gemma3", dict(hidden_size=27, num_attention_heads=3, head_dim=14, sliding_window=4, num_hidden_layers=3)),
    ("embedding_gemma", dict(sliding_window=2, num_attention_heads=2, attention_bias=True)),
    ("dinov2_registers", dict(use_swiglu_ffn=True, num_register_tokens=1, hidden_size=40)),
    ("dinov3", dict(hidden_size=36, num_attention_heads=3, num_register_tokens=4, key_bias=True, mlp_bias=False)),
    ("dinov3_gated", dict(num_attention_heads=4, num_register_tokens=0, query_bias=False, value_bias=False)),
    ("dinov3", dict(image_size=8, patch_size=(4, 2), num_register_tokens=1)),
    ("videomae", dict(use_mean_pooling=True, num_frames=4, tubelet_size=1)),
]


@pytest.mark.parametrize("name, sizes", SIZES, ids=[f"{name} {i}" for i, (name, _) in enumerate(SIZES)])
def test_hidden_states_and_learned_rows(name, sizes, device):
    model = tiny_encoders.build(name, **sizes).double()
    encoder, reference = from_pretrained_model(model).to(device), ReferenceEncoder(model).to(device)
    inputs = tiny_encoders.inputs(name, 3, dtype=torch.float64)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, :4] = inputs["attention_mask"][2, 3] = 0
    theirs = partial(tiny_encoders.hidden_states, model.to(device), name)  # with the tables of our device
    expected = on(device, theirs)(**inputs)
    real = tiny_encoders.token_mask(model, name, **inputs)
    real = torch.ones(expected.shape[:2], dtype=torch.bool) if real is None else real
    learned = torch.randn(2, encoder.width, dtype=torch.float64)
    oracle = on(device, reference.read)(inputs, learned)
    assert (on(device, encoder)(**inputs) - expected)[real].abs().max() < 1e-9
    tokens, mask = encoder.embed(**moved(inputs, device))
    read = encoder.read(tokens, padding_of(mask), moved(learned, device))
    for got, value in zip(moved(read, CPU), oracle, strict=True):
        assert (got - value).abs().max() < 1e-9
