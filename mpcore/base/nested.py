"""Tensors inside of whatever an optimizer keeps in its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of `value` in which every tensor is what `change` makes of it.

    Dictionaries, lists, tuples and named tuples are looked into and keep their types; what else
    there is, is deep-copied.

    Args:
        value: Any.
        change: Takes a tensor, returns one.

    Example:
        >>> import torch
        >>> map_tensors({"a": (torch.ones(1), 2)}, lambda tensor: tensor + 1)
        {'a': (tensor([2.]), 2)}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # a default factory comes along
        for key, item in value.items():
            changed[key] = map_tensors(item, change)
        return changed
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)
