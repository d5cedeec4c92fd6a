"""What one look at the gradients found, as plain numbers: unscaled, one record per parameter."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import overload

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


class FindingTable(Sequence[Finding]):
    """Findings as columns, made one by one when somebody asks for them.

    Two tables are equal if their findings are, also to a tuple of findings.

    Args:
        columns: What was found, on each device.
        places: In order: the place in the columns, one behind the other.
    """

    def __init__(self, columns: Sequence[Columns], places: Sequence[int]) -> None:
        self._columns = tuple(columns)
        self._places = places

    @cached_property
    def _made(self) -> tuple[Finding, ...]:
        sizes = list(map(len, self._columns))
        ends = list(accumulate(sizes))
        found = []
        for place in self._places:
            number = bisect_right(ends, place)
            before = ends[number] - sizes[number]
            found.append(self._columns[number].finding(place - before))
        return tuple(found)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._made)

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Finding]: ...

    def __getitem__(self, index: int | slice) -> Finding | Sequence[Finding]:
        return self._made[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (FindingTable, tuple)) and self._made == tuple(other)

    def __hash__(self) -> int:
        return hash(self._made)

    def __repr__(self) -> str:
        return repr(self._made)

    def figures(self) -> list[Figures]:
        """Returns the numbers of each that a sum of all is made of, without making findings."""
        figures = [one for columns in self._columns for one in columns.figures]
        return [figures[place] for place in self._places]

    def histogram(self) -> list[int] | None:
        """Returns the sum of the histograms of float16 gradients; None if there is none."""
        sums = [columns.bins for columns in self._columns if columns.bins is not None]
        return [sum(bins) for bins in zip(*sums, strict=True)] if sums else None


#: Of a gradient its dtype as text, how many values it has, which shares of them are 0 and subnormal
#: (None if nobody counted), and its headroom: see `Finding`.
Figures = tuple[str, int, float | None, float | None, float | None]


class Columns:
    """What was found in the gradients of one device, on the host; syncs with it, twice.

    Args:
        names: Of what was looked at.
        look: At it.
        scale: The loss scale it has.
        sums: Whether they are sums in float32, which say nothing about the format of the gradients.
    """

    def __init__(self, names: Sequence[str], look: Look, scale: float, *, sums: bool) -> None:
        found = look.found
        self._names = names
        self._shapes = look.shapes
        self._layouts = look.layouts
        self._scale = scale
        # all whole numbers are read at once, and all others: each read waits for the device
        whole = [found.kinds.long().unsqueeze(1), found.first_bad.unsqueeze(1)]
        real = [found.square_sum]
        self._has_largest = found.largest is not None and not sums
        if found.largest is not None:
            real.append(found.largest.double())
        totals = real[0][:0]
        self._is_counted = not sums and found.counts is not None and found.histogram is not None
        if not sums and found.counts is not None and found.histogram is not None:
            bins = _folded(found.histogram, found.counts)
            whole.append(bins)
            counts = found.counts.double()
            values = counts.sum(1).clamp(min=1)  # of all passes that were counted
            real += [counts[:, 3] / values, counts[:, 4] / values]
            totals = _of_float16(bins, [dtype for dtype, _ in look.layouts])
        # one list of numbers: thousands of lists would wake the garbage collector
        self._width = sum(part.shape[1] for part in whole)
        self._whole: list[int] = torch.cat(whole, 1).flatten().tolist()
        numbers = torch.cat([*real, totals]).tolist()
        count = len(self._names)
        columns = [numbers[count * i : count * (i + 1)] for i in range(len(real))]
        unknown: list[float | None] = [None] * count
        self._square_sums: list[float] = columns[0]
        self._largest = columns[1] if found.largest is not None else unknown
        self._zeros = columns[-2] if self._is_counted else unknown
        self._subnormal = columns[-1] if self._is_counted else unknown
        #: the sum of the histograms of float16 gradients; None if there is none
        self.bins = list(map(int, numbers[count * len(real) :])) or None

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def figures(self) -> list[Figures]:
        """The numbers of each gradient."""
        names = [_short(dtype) for dtype, _ in self._layouts]
        sizes = list(map(torch.Size.numel, self._shapes))
        return list(
            zip(names, sizes, self._zeros, self._subnormal, self._rooms(), strict=True),
        )

    def _rooms(self) -> Sequence[float | None]:
        if not self._has_largest:
            return [None] * len(self._names)
        scale = self._scale
        return [
            math.log2(_largest_of(dtype) / (largest * scale)) if largest else None
            for (dtype, _), largest in zip(self._layouts, self._largest, strict=True)
        ]

    def finding(self, place: int) -> Finding:
        """Returns what was found in one gradient."""
        dtype, strides = self._layouts[place]
        shape = self._shapes[place]
        at = place * self._width
        kinds, first_bad, *bins = self._whole[at : at + self._width]
        square_sum = self._square_sums[place]
        _, _, zeros, subnormal, headroom = self.figures[place]
        return Finding(
            name=self._names[place],
            shape=tuple(shape),
            dtype=_short(dtype),
            kinds=tuple(kind for bit, kind in enumerate(KINDS) if kinds >> bit & 1),
            first_bad=None if first_bad < 0 else index_at(first_bad, shape, strides),
            norm=math.sqrt(square_sum) if square_sum >= 0 else math.nan,
            largest=self._largest[place],
            headroom_bits=headroom,
            zeros=zeros,
            subnormal=subnormal,
            histogram=tuple(bins) if self._is_counted else None,
        )


def _of_float16(bins: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Returns the sum of the histograms of float16 gradients, float64; empty if there is none."""
    here = [place for place, dtype in enumerate(dtypes) if dtype == torch.float16]
    some = bins if len(here) == len(dtypes) else bins[here]
    return some.sum(0).double() if here else bins[:0, 0].double()


@cache
def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _largest_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


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
