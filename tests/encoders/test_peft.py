"""LoRA's gradients are those of PEFT on Hugging Face's own encoder with the same weights, family by family."""

import copy

import pytest
import tiny_encoders
import torch

from u2a_fast import LoraConfig
from u2a_fast.encoders import from_pretrained_model

R, SCALING = 3, 2.0
MEMBERS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
ROLE_LINEAR = {"q": "qkv", "k": "qkv", "v": "qkv", "gate_up": "fc1", "gate": "fc1", "up": "fc1"}


def factors_of(block, role):
    """Of a block's adapters, the places of those that Hugging Face's linear of `role` has: rows of A, blocks of B."""
    linear, members = getattr(block, ROLE_LINEAR.get(role, role)), MEMBERS.get(role, (role,))
    rows = torch.arange(len(linear.lora_b)).split(list(linear.widths))
    places = [linear.roles.index(member) for member in members]
    return linear, torch.arange(len(linear.lora_a)).view(-1, R)[places].flatten(), [rows[place] for place in places]


def of_peft(block, role, of=lambda parameter: parameter.detach()):
    """A and B as PEFT has them; of a linear that holds several roles: A's stacked, B's in blocks along the diagonal."""
    linear, a_rows, b_rows = factors_of(block, role)
    a, b = of(linear.lora_a), of(linear.lora_b)
    return a[a_rows], torch.block_diag(*(b[rows] for rows in b_rows))


def with_peft(encoder, model):
    """PEFT's adapters on every linear of the layers of a copy, and where they are: (block, role, PEFT's module)."""
    peft = pytest.importorskip("peft")
    model, family = copy.deepcopy(model), encoder.family
    paths = {
        f"{family.layers}.{i}.{family.path(role)}": (i, role)
        for i in range(len(encoder.blocks))
        for role in family.roles
    }
    ranks = {path: R * len(MEMBERS.get(role, (role,))) for path, (_, role) in paths.items()}
    config = peft.LoraConfig(
        target_modules=list(paths),
        rank_pattern={f"^{path}": rank for path, rank in ranks.items()},
        alpha_pattern={f"^{path}": SCALING * rank for path, rank in ranks.items()},
    )
    model = peft.inject_adapter_in_model(config, model)
    places = []
    for path, (i, role) in paths.items():
        module = model.get_submodule(path)
        for factor, value in zip((module.lora_A, module.lora_B), of_peft(encoder.blocks[i], role), strict=True):
            factor.default.weight.data = value.clone()
        places.append((encoder.blocks[i], role, module))
    return model, places


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_gradients_are_pefts(name):
    model = tiny_encoders.build(name).double()
    encoder = from_pretrained_model(model)
    targets = ("q", "k", "v", "o", "fc1", "fc2")
    for linear in (linear for block in encoder.blocks for linear in block.linears):
        linear.add_adapter(LoraConfig(r=R, lora_alpha=R * SCALING, target_modules=targets))
        torch.nn.init.normal_(linear.lora_b, std=0.1)
    adapted, places = with_peft(encoder.double(), model)
    inputs = tiny_encoders.inputs(name, 3, padded=True, dtype=torch.float64)
    real = tiny_encoders.token_mask(model, name, **inputs)
    expected, got = tiny_encoders.hidden_states(adapted, name, **inputs), encoder(**inputs)
    weight = torch.randn_like(got)
    weight = weight if real is None else weight * real[:, :, None]
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert len(places) == len(encoder.blocks) * len(encoder.family.roles)
    for block, role, module in places:
        a, b = of_peft(block, role, of=lambda parameter: parameter.grad)
        theirs = module.lora_B.default.weight.grad * (of_peft(block, role, torch.ones_like)[1])  # within the blocks
        torch.testing.assert_close(a, module.lora_A.default.weight.grad, rtol=1e-7, atol=1e-9, msg=role)
        torch.testing.assert_close(b, theirs, rtol=1e-7, atol=1e-9, msg=role)
        assert a.any() and b.any()
