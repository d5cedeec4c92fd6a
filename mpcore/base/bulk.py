"""Attributes of many tensors at once, read by C loops: a step asks each of thousands every time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from mpcore.base.dtensors import any_dtensor, held_here

_DTYPE = attrgetter("dtype")
_DEVICE = attrgetter("device")
_LAYOUT = attrgetter("layout")
_GRAD = attrgetter("grad")
_VERSION = attrgetter("_version")
_SHAPE = attrgetter("shape")


def dtypes_of(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    """Returns every dtype that occurs; no host sync."""
    return set(map(_DTYPE, tensors))


def dtypes_in_order(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    """Returns the dtype of each; no host sync."""
    return list(map(_DTYPE, tensors))


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Returns every device that occurs, in order of appearance; no host sync."""
    devices = list(map(_DEVICE, tensors))
    if devices and devices.count(devices[0]) == len(devices):
        return devices[:1]  # usually; to hash each takes three times as long
    return list(dict.fromkeys(devices))


def layouts_of(tensors: Iterable[Tensor]) -> set[torch.layout]:
    """Returns every layout that occurs; no host sync."""
    return set(map(_LAYOUT, tensors))


def have_shapes(tensors: Iterable[Tensor], shapes: Iterable[torch.Size]) -> bool:
    """Whether tensors have these shapes, in pairs; no host sync.

    No shape outlives its comparison: thousands in a list would wake the garbage collector.
    """
    return all(map(eq, map(_SHAPE, tensors), shapes))


def are_same(objects: Collection[Any], others: Collection[Any]) -> bool:
    """Whether two collections hold the same objects, in the same order."""
    return len(objects) == len(others) and all(map(is_, objects, others))


def with_gradient(params: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Returns the parameters that have a gradient, and their gradients; no host sync."""
    grads: list[Any] = list(map(_GRAD, params))
    if any(map(is_, grads, repeat(None))):
        params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    return params, grads


def grads_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the gradients of parameters that are known to have one; no host sync."""
    grads: list[Tensor | None] = list(map(_GRAD, params))
    if any(map(is_, grads, repeat(None))):  # the caller collected those that have one
        raise RuntimeError("a gradient vanished between the check and the step")
    return grads  # type: ignore[return-value]


def writes_to(tensors: Collection[Tensor], *, sharded: bool = True) -> list[int]:
    """Returns how often each tensor was written to, as far as autograd knows; no host sync.

    Of a DTensor writes to what this rank holds count as well: FSDP2 adds gradients up there. Nobody
    counts for tensors made in inference mode: -1.

    Args:
        tensors: Any.
        sharded: Whether some may be DTensors.
    """
    try:
        writes = list(map(_VERSION, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    if not (sharded and any_dtensor(tensors)):
        return writes
    held = map(held_here, tensors)
    return [
        count if here is tensor or here.is_inference() else count + here._version
        for tensor, here, count in zip(tensors, held, writes, strict=True)
    ]
