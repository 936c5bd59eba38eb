"""Operands of assemble_norm_project, its results and its gradients.

Data has a non-zero mean: an unmasked tail or a forgotten term hides behind zero-mean data.
"""

import torch

from u2a_fast.kernels import assemble_norm_project, backend

LEARNED = ("prefix", "suffix", "mask_token", "norm_weight", "norm_bias", "lora_a")

# batch, tokens, width, prefix, suffix, rank (None: not given), norm, present (None, "full" or "packed")
SHAPES = {
    "everything": (4, 5, 40, 2, 3, 6, "bias", "full"),
    "packed": (4, 5, 40, 2, 3, 6, "bias", "packed"),
    "no learned rows": (3, 7, 24, None, None, 1, "bias", None),
    "no norm": (3, 7, 136, 1, None, 24, None, "full"),
    "no rank": (3, 4, 290, None, 2, None, "no bias", None),
    "RMSNorm": (4, 5, 290, 2, 3, 6, "rms", "full"),
    "wide rank": (2, 6, 72, 3, None, 70, "bias", None),
    "rows only": (3, 5, 20, 1, 2, None, None, "packed"),
    "prompts only": (2, 0, 16, 4, None, 3, "bias", None),
    "no rows": (0, 5, 16, 2, None, 3, "bias", None),
    "nobody present": (2, 3, 16, 1, None, 3, "bias", "packed"),
}


def operands(name, dtype, seed=0, absent=float("nan")):
    """Non-zero mean throughout; parameters in fp32 (fp64 for fp64), one sample in three absent."""
    batch, tokens, width, prefix, suffix, rank, norm, presence = SHAPES[name]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.5):
        leaf = (torch.randn(*shape, generator=g, dtype=torch.float64) + mean).to(backend.wide(dtype))
        return leaf.requires_grad_()

    present = None if presence is None else torch.arange(batch) % 3 != 1
    if name == "nobody present":
        present[:] = False
    rows = (torch.randn(batch, tokens, width, generator=g, dtype=torch.float64) + 1.5).to(dtype)
    if presence == "packed":
        rows = rows[present]
    elif presence == "full":
        rows[~present] = absent
    return {
        "tokens": rows.requires_grad_(),
        "prefix": None if prefix is None else draw(prefix, width),
        "suffix": None if suffix is None else draw(suffix, width),
        "present": present,
        "mask_token": None if present is None else draw(width),
        "norm_weight": draw(width, mean=1.0) if norm else None,
        "norm_bias": draw(width) if norm == "bias" else None,
        "lora_a": None if rank is None else draw(rank, width, mean=0.1),
        "rms": norm == "rms",
    }


def clone(given, dtype=None):
    """The same leaves, cast to `dtype`."""
    leaves = {n: t.detach().to(dtype or t.dtype) for n, t in given.items() if is_leaf(t)}
    return given | {n: t.clone().requires_grad_() for n, t in leaves.items()}


def is_leaf(t):
    return torch.is_tensor(t) and t.is_floating_point()


def outputs_and_gradients(given, function=assemble_norm_project):
    """{name: tensor} of (h, s, rows) and of every gradient of a random combination of them."""
    outputs = dict(zip(("h", "s", "rows"), function(**given, eps=1e-5), strict=True))
    outputs = {n: t for n, t in outputs.items() if t is not None}
    loss = sum((t.double() * weight_of(n, t)).sum() for n, t in outputs.items())
    leaves = {n: t for n, t in given.items() if torch.is_tensor(t) and t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: t.detach() for n, t in outputs.items()} | {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}


def weight_of(name, t):
    g = torch.Generator().manual_seed(len(name))
    return torch.randn(t.shape, generator=g, dtype=torch.float64) + 0.3
