"""Gradients in the layout in memory that backends want."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcore.base.dtensors import held_here


def laid_out_like(buffer: Tensor, grad: Tensor) -> Tensor:
    """Returns `grad`, or a copy of it with the strides of `buffer`: backends want equal layouts."""
    if grad.stride() == buffer.stride():
        return grad
    return torch.empty_like(buffer, dtype=grad.dtype).copy_(grad)


def own_memory(param: Tensor, grad: Tensor) -> Tensor:
    """Returns `grad`; an expanded one is replaced by a copy in memory of its own.

    Nothing can be written to an expanded gradient, and fused kernels read behind its end.
    """
    here = held_here(grad)
    shape = zip(here.shape, here.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in shape):
        grad = param.grad = grad.clone(memory_format=torch.contiguous_format)
    return grad
