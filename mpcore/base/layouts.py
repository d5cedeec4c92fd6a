"""Gradients in the layout in memory that backends want."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mpcore.base.memory import PLAIN


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


def held_here(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a DTensor, whatever its placement; others as they are."""
    if type(tensor) in PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    # `to_local` goes through autograd, which takes as long as all else that a step asks
    local: Any = getattr(tensor, "_local_tensor", None)
    local = tensor.to_local() if local is None else local
    here: Tensor = local.wait() if hasattr(local, "wait") else local  # still on its way
    return here


def placed_like(param: Any, grad: Any) -> Tensor:
    """Returns a DTensor with the placements of a parameter: a sum of ranks is added up; collective.

    Layers of tensor parallel models leave such sums. Others are returned as they are, without one.
    """
    asked = getattr(param, "placements", None)
    if asked is None or getattr(grad, "placements", asked) == asked:
        here: Tensor = grad
    else:
        here = grad.redistribute(placements=asked)
    return here


def sharded_like(param: Any, value: Any) -> Tensor:
    """Returns a value for a parameter as the parameter is placed.

    Of a whole one each rank takes its own piece; a DTensor that is placed otherwise is
    redistributed, which is collective.

    Args:
        param: Any.
        value: Of its shape.
    """
    if hasattr(param, "placements") and not hasattr(value, "placements"):
        from torch.distributed.tensor import (
            DTensor,
            Replicate,
        )  # which not every build of torch has

        everywhere = [Replicate()] * param.device_mesh.ndim
        value = DTensor.from_local(value, param.device_mesh, everywhere, run_check=False)
    return placed_like(param, value)


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    return any(hasattr(kind, "to_local") for kind in set(map(type, tensors)))


def addresses_of(tensors: Iterable[Tensor], *, sharded: bool) -> list[int]:
    """Returns where tensors lie in memory; fails for sparse ones.

    Args:
        tensors: Any.
        sharded: Whether some may be DTensors, of which it is asked where what this rank holds is.
    """
    return list(map(Tensor.data_ptr, map(held_here, tensors) if sharded else tensors))
