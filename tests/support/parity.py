"""Give a fast model and its plain reference the same weights, and compare their gradients by name."""

import tiny_encoders
import torch

ROLE_LINEAR = {
    **dict.fromkeys(("q", "k", "v"), "qkv"),
    **dict.fromkeys(("fc1", "gate", "up"), "fc1"),
    **{"o": "o", "fc2": "fc2"},
}


def batch(families: dict[str, str], count: int, seed: int = 0, padded: bool = True, dtype=torch.float64) -> dict:
    """`{modality: inputs}` of `count` samples for `{modality: family}`."""
    return {
        name: tiny_encoders.inputs(family, count, seed=seed + i, padded=padded, dtype=dtype)
        for i, (name, family) in enumerate(families.items())
    }


def random_presence(count: int, modalities: int, seed: int) -> torch.Tensor:
    """bool [count, modalities] without an empty row."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(count, modalities, generator=generator) < 0.6
    present[torch.arange(count), torch.randint(modalities, (count,), generator=generator)] = True
    return present


def fast_factor(model, modality: str, layer: int, role: str, which: int):
    """`(parameter, rows)` where the fast model keeps the factor A (0) or B (1) of one role."""
    linear = getattr(model.encoders[modality].blocks[layer], ROLE_LINEAR[role])
    widths = dict(zip(linear.roles, linear.widths, strict=True))
    rows = [linear.lora_b.shape[1] if which == 0 else widths[adapted] for adapted in linear.adapted]
    place = linear.adapted.index(role)
    return (linear.lora_a, linear.lora_b)[which], slice(sum(rows[:place]), sum(rows[: place + 1]))


@torch.no_grad()
def share_factors(fast, reference) -> None:
    """Random LoRA factors, the same in both models."""
    for key, factors in reference.lora_factors().items():
        for which, factor in enumerate(factors):
            factor.normal_(std=0.3)
            parameter, rows = fast_factor(fast, *key, which)
            parameter[rows] = factor


@torch.no_grad()
def share_named(fast, reference, prefixes: tuple[str, ...]) -> list[str]:
    """Copy the reference's parameters under `prefixes` to those of the same name; their names."""
    own = dict(fast.named_parameters())
    names = [name for name, _ in reference.named_parameters() if name.startswith(prefixes)]
    for name in names:
        own[name].copy_(reference.get_parameter(name).view_as(own[name]))
    return names


def assert_same_gradients(fast, reference, names: list[str], limit: float) -> None:
    for key, factors in getattr(reference, "lora_factors", dict)().items():
        for which, factor in enumerate(factors):
            parameter, rows = fast_factor(fast, *key, which)
            assert_close(parameter.grad[rows], factor.grad, limit, f"LoRA factor {which} of {key}")
    own = dict(fast.named_parameters())
    for name in names:
        assert_close(
            own[name].grad.view_as(reference.get_parameter(name)), reference.get_parameter(name).grad, limit, name
        )


def assert_close(got, expected, limit: float, what: str) -> None:
    """Wherever either lies; no expected gradient is one of zeros."""
    expected = torch.zeros_like(got) if expected is None else expected
    worst = (got.cpu() - expected.cpu()).abs().max().item() if got.numel() else 0.0
    limit *= 10 if got.is_cuda else 1  # sums in any order
    assert worst < limit, f"{what}: off by {worst:.1e}"
