"""What one look at the gradients found, as plain numbers: unscaled, one record per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import innermost_first
from mpcore.engine import Look

#: The bits of `Inspection.kinds`, in order.
KINDS = ("NaN", "+inf", "-inf", "overflow when unscaled")


@dataclass(frozen=True)
class Finding:
    """The gradient of one parameter.

    Attributes:
        name: Of the parameter.
        shape: Of it.
        dtype: Of its gradient, "float16" for example.
        kinds: Which of `KINDS` were in it; empty if all is finite.
        first_bad: Index of the first value, in the order of memory, that is not finite, or None.
        norm: 2-norm of the unscaled values; not finite if one of them is not.
        largest: Largest magnitude among the finite ones, unscaled; None if nobody looked.
        headroom_bits: Doublings of the scale before the largest value overflows; None likewise, and
            of sums that `accumulate` made.
        zeros: Share of values that are 0; None without statistics, like the next two.
        subnormal: Share of values that are subnormal in the gradient's format: digits are lost.
        histogram: How many values have the exponent -24 + i before unscaling, for i = 0 to 39, the
            exponents that float16 has; smaller ones count in the first, larger ones in the last.
        passes: How many backward passes the last three and `largest` were counted in, together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]
    first_bad: tuple[int, ...] | None
    norm: float
    largest: float | None
    headroom_bits: float | None
    zeros: float | None = None
    subnormal: float | None = None
    histogram: tuple[int, ...] | None = None
    passes: int = 1

    @property
    def finite(self) -> bool:
        """Whether every value is finite."""
        return not self.kinds


#: Binary exponents of float16 values, subnormal ones included, that a histogram distinguishes.
LOWEST, HIGHEST = -24, 15


def findings_of(
    look: Look, scale: float, name_of: Callable[[Tensor], str], *, sums: bool
) -> list[Finding]:
    """Returns what was found in each gradient; syncs with the host, twice.

    Args:
        look: The gradients of one device.
        scale: The loss scale they have.
        name_of: Names a parameter.
        sums: Whether they are sums in float32, which say nothing about the format of the gradients.
    """
    findings = [
        _finding(param, dtype, strides, scale, name_of(param), *values)
        for param, (dtype, strides), values in zip(
            look.params, look.layouts, _rows(look, counted=not sums), strict=True
        )
    ]
    return [replace(one, headroom_bits=None) for one in findings] if sums else findings


def _rows(look: Look, *, counted: bool) -> Iterator[tuple[Any, ...]]:
    """Yields kinds, place, sum of squares, largest value, counts and histogram of each gradient.

    All whole numbers are read at once, and all others: each read waits for the device.
    """
    found = look.found
    whole = [found.kinds.long().unsqueeze(1), found.first_bad.unsqueeze(1)]
    real = [found.square_sum]
    if counted and found.counts is not None and found.histogram is not None:
        whole += [found.counts, _folded(found.histogram, found.counts)]
    if found.largest is not None:
        real.append(found.largest.double())
    numbers = zip(torch.cat(whole, 1).tolist(), torch.stack(real, 1).tolist(), strict=True)
    for (kinds, first_bad, *counts), (square_sum, *largest) in numbers:
        largest_or_none = largest[0] if largest else None
        yield kinds, first_bad, square_sum, largest_or_none, counts[:6] or None, counts[6:] or None


def _finding(
    param: Tensor,
    dtype: torch.dtype,
    strides: tuple[int, ...],
    scale: float,
    name: str,
    kinds: int,
    first_bad: int,
    square_sum: float,
    largest: float | None,
    counts: list[int] | None,
    histogram: list[int] | None,
) -> Finding:
    values = max(sum(counts or ()), 1)  # of all passes that were counted
    headroom = None
    if largest:
        headroom = math.log2(torch.finfo(dtype).max / (largest * scale))
    return Finding(
        name=name,
        shape=tuple(param.shape),
        dtype=str(dtype).removeprefix("torch."),
        kinds=tuple(kind for bit, kind in enumerate(KINDS) if kinds >> bit & 1),
        first_bad=None if first_bad < 0 else index_at(first_bad, param.shape, strides),
        norm=math.sqrt(square_sum) if square_sum >= 0 else math.nan,
        largest=largest,
        headroom_bits=headroom,
        zeros=None if counts is None else counts[3] / values,
        subnormal=None if counts is None else counts[4] / values,
        histogram=None if histogram is None else tuple(histogram),
    )


def _folded(histogram: Tensor, counts: Tensor) -> Tensor:
    """Returns the 40 bins of float16's exponents; zeros and what is not finite are in none."""
    low, high = 127 + LOWEST, 127 + HIGHEST
    first = histogram[:, : low + 1].sum(1, keepdim=True) - counts[:, 3:4]
    last = histogram[:, high:255].sum(1, keepdim=True)
    return torch.cat([first, histogram[:, low + 1 : high], last], 1)


def index_at(place: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Returns the index of the value at a place in the order of memory of a dense tensor.

    Example:
        >>> index_at(3, (2, 3), (3, 1)), index_at(3, (2, 3), (1, 2))
        ((1, 0), (1, 1))
    """
    index = [0] * len(shape)
    for dimension in innermost_first(shape, strides):
        place, index[dimension] = divmod(place, max(shape[dimension], 1))
    return tuple(index)
