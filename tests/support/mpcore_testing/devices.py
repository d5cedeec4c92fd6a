"""Several devices without having any: tensors that say where they are and compute on the CPU.

An operation over tensors of two devices raises, as on real ones, unless it is a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: of a type that every PyTorch has; an index alone makes them two
FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")


class PlacedTensor(torch.Tensor):
    """A tensor on a claimed device.

    Attributes:
        values: The CPU tensor that holds its values.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> PlacedTensor:
        """Returns `values` as a tensor on `device`."""
        placed: PlacedTensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=device
        )
        placed.values = values
        return placed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes `func` on the CPU."""
        return _on_cpu(func, args, kwargs or {})


class SimulatedDevices(TorchDispatchMode):
    """Within it, tensors can be made on `FIRST` and `SECOND`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes `func` on the CPU."""
        return _on_cpu(func, args, kwargs or {})


def _on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    placed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PlacedTensor)]
    same_object = {id(tensor.values): tensor for tensor in placed}
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif placed:
        devices = {tensor.device for tensor in placed}
        if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func}: expected tensors of one device, got {devices}")
        device = placed[0].device
    result = func(*tree_map(_values, args), **tree_map(_values, kwargs))

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor) or device is None or torch.device(device).type == "cpu":
            return value
        known = same_object.get(id(value))  # an in-place operation returns what it was given
        return PlacedTensor(value, torch.device(device)) if known is None else known

    return tree_map(place, result)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, PlacedTensor) else leaf
