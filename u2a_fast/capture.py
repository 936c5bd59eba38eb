"""A training step as one CUDA graph: forward and backward are one launch, whatever they consist of.

A step of small batches is bound by the host, which launches a thousand kernels for ten milliseconds of work. A graph
holds them with the addresses of their operands, so a batch is copied to where the first of its shapes lay, and
parameters may only change in place. Graphs share one memory pool: no two run at a time, and what leaves one is copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import get_backend
from .kernels.backend import cast_ahead

Losses = tuple[Tensor, ...]  # what a step computes; its first entry is differentiated

MOST_GRAPHS = 64  # they share the memory of activations, but each holds its inputs, gradients and list of kernels
WARM_UP = 2  # runs before a capture: they build kernels and take what libraries allocate once


def record(run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
    """`run`, captured: what replays it, its result, which every replay writes again, and the memory it lies in."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a loader's thread may pin memory
        result = run()
    return graph.replay, result, graph.pool()


class Step:
    """The graph of one shape of batch.

    Args:
        function: tensors -> losses.
        tensors: a batch, on the GPU.
        trained: parameters that get the gradient of the first loss.
        ahead: tensors that are cast in the beginning, and the dtypes they are cast to.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Tensor]], Losses],
        tensors: Sequence[Tensor],
        trained: list[Tensor],
        pool: Any,
        ahead: Sequence[tuple[Tensor, torch.dtype]] = (),
    ):
        self.tensors, self.trained, self.replays = [t.detach().clone() for t in tensors], trained, 0

        def run() -> tuple[Losses, tuple[Tensor | None, ...]]:
            with cast_ahead(ahead):
                losses = function(self.tensors)
                return losses, torch.autograd.grad(losses[0], trained, allow_unused=True)

        # A copy that autocast keeps of a parameter would be the one of the capture for ever.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self.replay, (self.losses, self.grads), self.pool = record(run, pool)
        finally:
            torch.set_autocast_cache_enabled(cached)

    @torch.no_grad()
    def launch(self, tensors: Sequence[Tensor]) -> None:
        """Run the whole step for another batch of the same shapes."""
        for own, given in zip(self.tensors, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self.replay()
        self.replays += 1

    def __call__(self, tensors: Sequence[Tensor]) -> Losses:
        """The losses of another batch of the same shapes; only the first can be differentiated."""
        self.launch(tensors)  # before autograd looks at every parameter: the GPU is busy by then
        return _Launched.apply(self, *self.trained)


class _Launched(torch.autograd.Function):
    """The losses of the step that runs; backward hands out the gradients that it leaves behind."""

    @staticmethod
    def forward(ctx: Any, step: Step, *trained: Tensor) -> Losses:
        ctx.step, ctx.replays = step, step.replays
        ctx.set_materialize_grads(False)
        losses = tuple(t.detach().clone() for t in step.losses)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.replays != ctx.step.replays:
            raise RuntimeError("a later step has overwritten these gradients: call backward before the next forward")
        found = [i for i, g in enumerate(ctx.step.grads) if g is not None]
        grads: list[Tensor | None] = [None] * len(ctx.step.grads)
        scaled = torch._foreach_mul([ctx.step.grads[i] for i in found], d_loss)
        for i, g in zip(found, scaled, strict=True):
            grads[i] = g
        return None, *grads


class Steps:
    """The captured steps of a model, one for each shape of batch that it has met.

    Args:
        model: whose parameters that require a gradient now get theirs; to list them takes longer than to launch a step.
        ahead: what a step casts in the beginning, as `Step` takes it.
    """

    def __init__(self, model: nn.Module, ahead: Callable[[], Sequence[tuple[Tensor, torch.dtype]]] = tuple):
        self.trained, self.ahead = [p for p in model.parameters() if p.requires_grad], ahead
        self.pool: Any = None
        self.steps: dict[Hashable, Step] = {}

    def forget(self) -> None:
        """Drop every graph: what they compute with is about to change its place."""
        self.steps.clear()
        self.pool = None

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has parameters elsewhere, and captures when it is told to."""

    def __call__(self, function: Callable[[Any], Losses], batch: Any, key: Hashable) -> Losses:
        """`function(batch)`, replayed where a batch of the same shapes under the same `key` was captured.

        Args:
            batch: tensors in dictionaries; other values count as shapes do.
        """
        leaves = dict(_leaves(batch))
        tensors = [leaf for leaf in leaves.values() if torch.is_tensor(leaf)]
        shapes = tuple((path, *_shape(leaf)) for path, leaf in leaves.items())
        under = get_backend(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = key, shapes, *under
        if key not in self.steps:
            if len(self.steps) >= MOST_GRAPHS:
                warnings.warn(
                    f"{MOST_GRAPHS} shapes of batches are captured already: others run without a graph", stacklevel=2
                )
                return function(batch)

            at = [path for path, leaf in leaves.items() if torch.is_tensor(leaf)]
            others = {path: leaf for path, leaf in leaves.items() if path not in at}  # this batch is not to be kept

            def of_tensors(own: Sequence[Tensor]) -> Losses:
                return function(_nested(others | dict(zip(at, own, strict=True))))

            on_device = [t.to(self.trained[0].device) for t in tensors]
            self.steps[key] = Step(of_tensors, on_device, self.trained, self.pool, self.ahead())
            self.pool = self.steps[key].pool
        return self.steps[key](tensors)


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys on the way, what is no mapping). A processor's result is a mapping, and nothing that PyTorch knows."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _shape(leaf: Any) -> tuple[Hashable, ...]:
    return (leaf.shape, leaf.dtype) if torch.is_tensor(leaf) else (repr(leaf),)


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The dictionaries that `_leaves` took apart."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        at = tree
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = leaf
    return tree
