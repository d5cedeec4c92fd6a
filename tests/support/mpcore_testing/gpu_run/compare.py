"""How two tensors differ in bits: how often, by how much, the first value and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore_testing.kernels import INTEGER, bits_of

_WIDTH = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}


class Differences:
    """Adds up comparisons of one row.

    Attributes:
        values: Compared.
        different: How many of them differ in bits, NaNs made equal.
        max_ulp: The largest distance in numbers of the format among finite differing floats.
        other: Differing values that have no such distance: integers, NaNs, infinities.
        first: The first one that differs: where, inputs, got, expected.
    """

    def __init__(self) -> None:
        self.values = self.different = self.max_ulp = self.other = 0
        self.first: dict[str, Any] | None = None

    def add(
        self,
        name: str,
        actual: Tensor,
        expected: Tensor,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compares two tensors; both may be on any device.

        Args:
            name: What they hold.
            actual: From the kernels.
            expected: From the reference.
            inputs: Tensors of the same number of elements, or of one, that they were computed from.
        """
        if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
            raise ValueError(
                f"{name}: expected {expected.dtype} of shape {tuple(expected.shape)}, got "
                f"{actual.dtype} of shape {tuple(actual.shape)}"
            )
        a, e = (tensor.detach().cpu().reshape(-1) for tensor in (actual, expected))
        self.values += a.numel()
        places = (_bits(a) != _bits(e)).nonzero().flatten()
        if not len(places):
            return
        self.different += len(places)
        self._measure(a[places], e[places])
        if self.first is None:
            place = int(places[0])
            self.first = {
                "of": name,
                "index": place,
                "got": shown(a[place]),
                "expected": shown(e[place]),
                "inputs": {key: _at(tensor, place) for key, tensor in (inputs or {}).items()},
            }

    def _measure(self, a: Tensor, e: Tensor) -> None:
        if not a.is_floating_point():
            self.other += len(a)
            return
        both = a.isfinite() & e.isfinite()
        self.other += int((~both).sum())
        if both.any():
            apart = (_ordered(a[both]) - _ordered(e[both])).abs()
            self.max_ulp = max(self.max_ulp, int(apart.max()))

    def to_row(self) -> dict[str, Any]:
        """As the row of a `Recorder`."""
        counts = {"values": self.values, "different": self.different}
        return {**counts, "max_ulp": self.max_ulp, "other": self.other, "first": self.first}


def _bits(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64:
        return torch.where(tensor.isnan(), 0x7FF8 << 48, tensor.view(torch.int64))
    bits: Tensor = bits_of(tensor)
    return bits


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the floats, neighbours one apart, both zeros 0."""
    if tensor.dtype == torch.float64:
        raw = tensor.view(torch.int64)
        return torch.where(raw < 0, -(raw & (2**63 - 1)), raw)
    raw = tensor.view(INTEGER[tensor.dtype]).long()
    return torch.where(raw < 0, -(raw + 2 ** (_WIDTH[tensor.dtype] - 1)), raw)


def _at(tensor: Tensor, place: int) -> str:
    flat = tensor.detach().reshape(-1)
    return shown(flat[place if flat.numel() > 1 else 0].cpu())


def shown(value: Tensor) -> str:
    """A 0-d tensor as its value and its bits."""
    if not value.is_floating_point():
        return str(value.item())
    width = _WIDTH[value.dtype]
    kind = torch.int64 if width == 64 else INTEGER[value.dtype]
    bits = int(value.reshape(1).view(kind).item()) % 2**width
    return f"{value.item()!r} (0x{bits:0{width // 4}x})"
