"""What a quantised model must compute: the same as a floating one that holds its rounded weights."""

import copy

import torch

from u2a_fast.kernels import dequantize_rows, unpack_nf4


def dequantised(model):
    """A copy of the model whose frozen linears are floating again, float64."""
    model = copy.deepcopy(model)
    for block in (block for encoder in model.encoders.values() for block in encoder.blocks):
        for linear in block.linears:
            stored = linear.weight.detach(), linear.weight_scale.detach()
            if linear.storage == "nf4":
                weight = unpack_nf4(*stored, (linear.out_features, linear.in_features), torch.float64)
            else:
                weight = dequantize_rows(*stored, torch.float64)
            linear.store(weight, None)
    return model
