"""How large the values of tensors are, and which of them 16 bits cannot hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore.errors import ArgumentError
from mpcore.monitoring.operations import values_of


class _Format(NamedTuple):
    """Where a 16-bit format ends, when rounding to nearest even."""

    top: int  # numbers from 2^top on are infinite ...
    bits: int  # ... and those below that differ from it by less than half of the last place
    bottom: int  # 2^bottom, half of the smallest number, is 0, and what is below

    @property
    def limit(self) -> float:
        """The smallest number that becomes infinite."""
        return math.ldexp(1 - 2.0 ** -(self.bits + 1), self.top)


_FORMATS = {torch.float16: _Format(16, 11, -25), torch.bfloat16: _Format(128, 8, -134)}


@dataclass(frozen=True)
class Range:
    """The sizes of the values of one tensor, or of several of one module.

    Attributes:
        kind: "input" (a tensor of the batch), "weight", "buffer", "activation", "loss", "gradient"
            (of an activation) or "weight gradient".
        name: Of the parameter, buffer or module; of an operation between modules also what torch
            calls it, and its line.
        largest: Largest finite magnitude; 0 if there are none but zeros.
        smallest: Smallest magnitude that is not 0.
        exponents: How many values have which binary exponent; zeros and infinities are left out.
        infinite: How many values are infinite in float32 itself. Those of masks, all -inf, are left
            out if the loss is finite.
        rounding_up: For each format, those of `exponents` that would be rounded up to the next.
        powers: Those of `exponents` that are powers of two.
        between: Whether it is of an operation between modules.
        wide: Whether it stays in float32 when `cast_model` has cast the model, as was tried.

    Example:
        >>> one = range_of("weight", "w", [torch.tensor([1.0, 65504.0, 65520.0, 2.0**-25])])
        >>> one.overflowing(torch.float16), one.flushed(torch.float16)
        (0.25, 0.25)
        >>> one.overflowing(torch.bfloat16), one.flushed(torch.bfloat16)
        (0.0, 0.0)
    """

    kind: str
    name: str
    largest: float
    smallest: float
    exponents: dict[int, int]
    infinite: int = 0
    rounding_up: Mapping[torch.dtype, dict[int, int]] = field(default_factory=dict)
    powers: dict[int, int] = field(default_factory=dict)
    between: bool = False
    wide: bool = False

    def scaled_by(self, loss_scale: float) -> float:
        """Returns what a loss scale multiplies these by: gradients alone."""
        return loss_scale if "gradient" in self.kind else 1.0

    def overflows(self, dtype: torch.dtype, scale: float = 1.0) -> bool:
        """Returns whether a finite value would be rounded to infinity; exact for any scale.

        Activations and gradients become infinite then. Weights do not: `cast_model` refuses them,
        and a step that gets there leaves the largest number of the format.

        Args:
            dtype: float16 or bfloat16.
            scale: What they are multiplied by first.

        Raises:
            ArgumentError: It is another format.
        """
        return self.largest * scale >= _format(dtype).limit

    def flushes(self, dtype: torch.dtype, scale: float = 1.0) -> bool:
        """Returns whether a value would be rounded to 0, likewise."""
        return 0.0 < self.smallest * scale <= 2.0 ** _format(dtype).bottom

    def overflowing(self, dtype: torch.dtype, scale: float = 1.0) -> float:
        """Returns the share of finite values, zeros left out, that `overflows` is about.

        Args:
            dtype: float16 or bfloat16.
            scale: What they are multiplied by first. With a power of two the share is exact; else
                it counts whole exponents, and may be off by those of one.

        Raises:
            ArgumentError: It is another format.
        """
        edge = _format(dtype).top - math.log2(scale)
        lost = sum(n for e, n in self.exponents.items() if e >= edge)
        rounded = self.rounding_up.get(dtype, {})
        return self._share(lost + sum(n for e, n in rounded.items() if e == edge - 1))

    def flushed(self, dtype: torch.dtype, scale: float = 1.0) -> float:
        """Returns the share of values, zeros left out, that would become 0, likewise."""
        edge = _format(dtype).bottom - math.log2(scale)
        lost = sum(n for e, n in self.exponents.items() if e < edge)
        return self._share(lost + sum(n for e, n in self.powers.items() if e == edge))

    def _share(self, lost: int) -> float:
        return lost / sum(self.exponents.values()) if lost else 0.0


def limit_of(dtype: torch.dtype) -> float:
    """Returns the smallest number that is rounded to infinity.

    Raises:
        ArgumentError: The format is neither float16 nor bfloat16.

    Example:
        >>> limit_of(torch.float16)
        65520.0
    """
    return _format(dtype).limit


def _format(dtype: torch.dtype) -> _Format:
    if dtype not in _FORMATS:
        raise ArgumentError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}.")
    return _FORMATS[dtype]


@torch.no_grad()
def range_of(kind: str, name: str, tensors: Sequence[Tensor], *, masks: bool = False) -> Range:
    """Returns the sizes of the values of some tensors; NaN counts as nothing; syncs with the host.

    Args:
        kind: See `Range`.
        name: Likewise.
        tensors: Floating ones.
        masks: Whether to leave out what is at or below the most negative number of float16, if all
            of it is one number, as in a mask; 16 bits may make it -inf, or clamp it.
    """
    seen = [values_of(tensor) for tensor in tensors]
    flat = [part.float().reshape(-1) for part in seen if part is not None]
    values = torch.cat(flat) if flat else torch.zeros(0)
    if masks:
        below = values <= torch.finfo(torch.float16).min
        low = values[below]
        values = values[~below] if bool((low == low[:1]).all()) else values
    values = values.abs()
    infinite = int((values == torch.inf).sum())
    values = values[(values > 0) & (values < torch.inf)]
    if not values.numel():
        return Range(kind, name, 0.0, 0.0, {}, infinite)
    fractions, exponents = torch.frexp(values)  # fractions from 1/2 on
    exponents = exponents - 1
    rounding_up = {
        dtype: _counted(exponents[fractions >= 1 - 2.0 ** -(form.bits + 1)])
        for dtype, form in _FORMATS.items()
    }
    return Range(
        kind=kind,
        name=name,
        largest=float(values.amax()),
        smallest=float(values.amin()),
        exponents=_counted(exponents),
        infinite=infinite,
        rounding_up=rounding_up,
        powers=_counted(exponents[fractions == 0.5]),
    )


def _counted(exponents: Tensor) -> dict[int, int]:
    lowest = 160  # below that of the smallest subnormal number
    counts = torch.bincount(exponents.long() + lowest).tolist()
    return {place - lowest: count for place, count in enumerate(counts) if count}
