"""`inspect` of the cpu backend: one read of the gradients, a sum of squares per chunk.

A chunk whose sum of squares is an ordinary float32 number is finite. Any other chunk is summed in
float64, and one that holds or makes something that is not finite goes to the reference backend,
which tells exactly what. So `kinds`, `first_bad` and `found_inf` are bitwise those of the reference
backend. Squares are added by `torch.sum`, which adds in a tree, and chunks in float64: norms are
within 1e-6 of the exact ones, the same in every run with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends import _inspection
from mpcore.backends._blocks import Piece, blocks, copy_all, cut, layout, memory_order, new_scratch
from mpcore.backends._cpu_update import Plan, prepare_
from mpcore.backends._inspection import Inspection
from mpcore.updates import Hyper

# float32 sums of squares between these have lost nothing to underflow that counts
_SMALLEST, _LARGEST = 2.0**-60, 2.0**120
# a vector of this length or shorter holds no product that overflows; of this or longer, none whose
# rounding to a subnormal number counts
_LONGEST, _SHORTEST = 2.0**127, 2.0**-110
# elements that are widened to float64 at once
_WIDE = 2**16


@torch.no_grad()
def inspect(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    max_norm: float | None,
    *,
    statistics: bool = False,
    plan: Plan | None = None,
    hyper: Hyper | None = None,
) -> Inspection:
    """Finds overflow, norms and the clip of gradients that stay as they are; CPU tensors.

    Bitwise `mpcore.backends.reference.inspect` in `kinds`, `first_bad` and `found_inf`, and in all
    fields with statistics; `square_sum` within 2e-6 of the sum in float64.

    Args:
        grads: See the reference backend, also for the others.
        coefficient: See there.
        max_norm: See there.
        statistics: Whether to fill `counts`, `histogram` and `largest`, which is None otherwise:
            finding the largest would cost as much again as finding the norm.
        plan: See there.
        hyper: See there.

    Raises:
        ArgumentError: See there.
    """
    limit = float(torch.tensor(_inspection.check_max_norm(max_norm)))  # rounded to float32
    _inspection.check_dtypes(grads)
    if plan is not None and hyper is not None:
        prepare_(plan, hyper)
    if statistics:
        return _inspection.inspect(grads, coefficient, max_norm, statistics=True)
    factor = float(coefficient)
    found = _find([memory_order(grad) for grad in grads], coefficient)
    norm = math.sqrt(math.fsum(found.sums))
    overflow = any(found.kinds)
    clip = 1.0 if overflow else min(limit / (norm + 1e-6), 1.0)
    return Inspection(
        kinds=torch.tensor(found.kinds, dtype=torch.int32),
        first_bad=torch.tensor(found.first_bad, dtype=torch.int64),
        square_sum=torch.tensor(found.sums, dtype=torch.float64),
        largest=None,
        found_inf=torch.tensor(int(overflow), dtype=torch.int32),
        grad_norm=torch.tensor(norm, dtype=torch.float64).float(),
        coefficient=torch.tensor(factor * clip, dtype=torch.float64).float(),
    )


@dataclass(frozen=True)
class _Found:
    """What is in each gradient times the coefficient: see `Inspection`."""

    kinds: list[int]
    first_bad: list[int]
    sums: list[float]


def _find(flat: list[Tensor], coefficient: Tensor) -> _Found:
    count, factor = len(flat), float(coefficient)
    found = _Found([0] * count, [-1] * count, [0.0] * count)
    sizes = [grad.numel() for grad in flat]
    scratch = new_scratch(sizes)
    for block in blocks(sizes):
        values = cut(flat, block)
        for piece, piece_values, square in zip(
            block, values, _square_sums(block, values, scratch), strict=True
        ):
            if not _SMALLEST < square < _LARGEST:
                square = _wide_square_sum(piece_values)
            length = math.sqrt(square) * abs(factor)
            if (square == 0.0 and math.isfinite(factor)) or _SHORTEST < length < _LONGEST:
                found.sums[piece.index] += square * factor * factor
            else:
                _look_closely(piece, piece_values, coefficient, found)
    return found


def _square_sums(block: list[Piece], values: list[Tensor], scratch: Tensor) -> list[float]:
    """Returns the float32 sum of squares of each piece; `scratch` holds the squares."""
    here = layout(block, scratch)
    copy_all(here, values)
    squares = scratch[: sum(part.numel() for part in here)]
    squares.mul_(squares)
    if len(here) == 1:
        return [float(squares.sum())]
    return torch.stack([part.sum() for part in here]).tolist()


def _wide_square_sum(values: Tensor) -> float:
    """Returns the sum of squares, in float64: infinite or NaN only if an element is."""
    parts = (part.double() for part in torch.split(values, _WIDE))
    return sum(float(part.mul_(part).sum()) for part in parts)


def _look_closely(piece: Piece, values: Tensor, coefficient: Tensor, found: _Found) -> None:
    """Adds what the reference backend finds in a piece."""
    exact = _inspection.inspect([values], coefficient, None)
    index, first_bad = piece.index, int(exact.first_bad)
    found.kinds[index] |= int(exact.kinds)
    found.sums[index] += float(exact.square_sum)
    if found.first_bad[index] == -1 and first_bad != -1:
        found.first_bad[index] = piece.start + first_bad
