"""Training steps of a model as CUDA graphs: what a method says of its batches, and `capture`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import device_table
from ..capture import Steps
from ..kernels.backend import compute_dtype
from .presence import all_take_part

PaddingMasks = Mapping[str, Tensor | None]


class CapturedSteps(nn.Module):
    """Part of `MultimodalModel`; methods that define `fixed` and `encode_fixed` can be captured."""

    _steps: Steps | None = None

    def fixed(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None
    ) -> dict[str, Any]:
        """The batch as `encode_fixed` takes it: whatever decides which kernels run is the shape of a tensor."""
        raise NotImplementedError

    def encode_fixed(self, fixed: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """`encode` of `fixed`'s result, and presence, reading no value on the host."""
        raise NotImplementedError

    def capture(self, batch: Mapping[str, Any] | None = None) -> None:
        """From now on, replay training steps as CUDA graphs: forward and backward in one launch. U2A alone has them.

        A step with labels is captured when a batch of its shapes is first met (a second and the memory of its
        activations, up to 64 shapes), and replayed afterwards. With `absent="pack"` the samples of each modality are
        filled up to a multiple of an eighth of the batch, rows of texts to one of a sixteenth, so that shapes recur.
        What requires a gradient now gets one: call it again after freezing or unfreezing. A loss in fp16 is not scaled
        before it is differentiated: use bf16.

        Args:
            batch: keywords of `forward`, whose shapes are captured at once.

        Raises:
            ValueError: the model is on no GPU, its kernels depend on values of the batch, or processes train together.
        """
        refuse_together()
        if type(self).fixed is CapturedSteps.fixed:
            raise ValueError(
                f"the kernels that {type(self).__name__} runs depend on values of the batch: none is captured"
            )
        if self.device.type != "cuda":
            raise ValueError(
                f"a CUDA graph needs the model on a GPU, not on {self.device}: call model.to('cuda') first"
            )
        measured = device_table.of_device(self.device)
        for block in (block for encoder in self.encoders.values() for block in encoder.blocks):
            for linear in (block.qkv, block.fc1):
                if not device_table.own_wins(measured, linear.out_features, linear.in_features):
                    linear.join()
        self._steps = Steps(self, self._adapters_ahead)
        if batch is not None:
            self(**batch)

    def _adapters_ahead(self) -> list[tuple[Tensor, torch.dtype]]:
        """Matrices that train, and what they are multiplied as where they are stored as something else."""
        found = []
        for encoder in self.encoders.values():
            dtype = compute_dtype(torch.empty(0, dtype=encoder.dtype, device=self.device))
            matrices = (p for p in encoder.parameters() if p.requires_grad and p.dim() == 2 and p.dtype != dtype)
            found += [(matrix, dtype) for matrix in matrices]
        return found

    def _apply(self, fn: Callable, recurse: bool = True) -> CapturedSteps:
        """As in `nn.Module`; graphs hold the addresses of parameters, which may move."""
        if self._steps is not None:
            self._steps.forget()
        return super()._apply(fn, recurse)

    def _captured(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None, labels: Tensor
    ) -> tuple[Tensor, ...]:
        assert self._steps is not None
        refuse_together()  # who joined after `capture`

        def losses(batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
            return self.losses(*self.encode_fixed(batch["fixed"]), batch["labels"])

        return self._steps(losses, {"fixed": self.fixed(inputs, present, padding), "labels": labels}, self.training)


def refuse_together() -> None:
    """ValueError under `torch.distributed`: DDP keeps autograd's nodes on a stream that no capture may wait for."""
    if all_take_part():
        raise ValueError("a CUDA graph is for a process that trains alone: under DDP and FSDP2 leave capture() out")
