"""Tensors inside of other things, and waiting for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in nested dicts, lists and tuples; the parts of those made of parts.

    Example:
        >>> [t.numel() for t in tensors_in({"a": torch.ones(2), "b": [3, torch.ones(4)]})]
        [2, 4]
    """
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from tensors_in([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
