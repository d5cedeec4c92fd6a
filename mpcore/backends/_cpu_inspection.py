"""`inspect` of the cpu backend: one read of the gradients, a sum of squares per chunk.

A chunk whose sum of squares is an ordinary float32 number is finite. Any other chunk is summed in
float64, and one that holds or makes something that is not finite goes to the reference backend,
which tells exactly what. So `kinds`, `first_bad` and `found_inf` are bitwise those of the reference
backend. Squares are added by `torch.sum`, which adds in a tree, and chunks in float64: norms are
within 1e-6 of the exact ones, the same in every run with the same number of threads.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpcore.backends import _inspection
from mpcore.backends._blocks import blocks, copy_all, cut, layout, memory_order, new_scratch
from mpcore.backends._cpu_update import Plan, prepare_
from mpcore.backends._inspection import Inspection
from mpcore.updates import Hyper

# float32 sums of squares between these have lost nothing to underflow that counts
_SMALLEST, _LARGEST = 2.0**-60, 2.0**120
# a vector of this length or shorter holds no product that overflows; of this or longer, none whose
# rounding to a subnormal number counts
_LONGEST, _SHORTEST = 2.0**127, 2.0**-110
#: Sums of squares, and lengths of vectors, between these tell all there is to know of a chunk.
BOUNDS = (_SMALLEST, _LARGEST, _SHORTEST, _LONGEST)
# elements that are widened to float64 at once
_WIDE = 2**16


@torch.no_grad()
def inspect(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    max_norm: float | None,
    *,
    inverted: bool = False,
    statistics: bool = False,
    plan: Plan | None = None,
    hyper: Hyper | None = None,
) -> Inspection:
    """Finds overflow, norms and the clip of gradients that stay as they are; CPU tensors.

    Bitwise `mpcore.backends.reference.inspect` in `kinds`, `first_bad`, `found_inf` and what
    statistics fill; `square_sum` within 2e-6 of the sum in float64.

    Args:
        grads: See the reference backend, also for the others.
        coefficient: See there.
        max_norm: See there.
        inverted: See there.
        statistics: Whether to fill `counts`, `histogram` and `largest`, which is None otherwise:
            finding the largest would cost as much again as finding the norm.
        plan: See there.
        hyper: See there.

    Raises:
        ArgumentError: See there.
    """
    limit = _inspection.rounded_max_norm(max_norm)
    _inspection.check_dtypes(grads)
    if plan is not None and hyper is not None:
        prepare_(plan, hyper)
    unscale = coefficient.reciprocal() if inverted else coefficient
    flat = [memory_order(grad) for grad in grads]
    chunks, sums = _square_sums(flat)
    found = conclude(flat, chunks, sums, unscale, limit)
    if not statistics:
        return found
    # the norm stays what it is without: looking must not change a bit of the clip
    seen = _inspection.inspect(grads, unscale, None, statistics=True)
    return replace(found, largest=seen.largest, counts=seen.counts, histogram=seen.histogram)


@torch.no_grad()
def conclude(
    flat: Sequence[Tensor], chunks: Tensor, sums: Tensor, coefficient: Tensor, limit: float
) -> Inspection:
    """Returns what the sums of squares of all chunks tell; looks again at those that tell nothing.

    Args:
        flat: Gradients whose elements lie in memory in their order.
        chunks: int64 `[chunks, 3]`, in order: tensor, first element, end.
        sums: float64 `[chunks]`. A sum of float32 squares, in any order.
        coefficient: 0-d float32.
        limit: Of the norm of the unscaled gradients.
    """
    factor = float(coefficient)
    lengths = sums.sqrt() * abs(factor)
    known = (sums > _SMALLEST) & (sums < _LARGEST) & (lengths > _SHORTEST) & (lengths < _LONGEST)
    count = len(flat)
    found = _Found([0] * count, [-1] * count)
    squares = sums * factor * factor
    if not bool(known.all()):
        for i in known.logical_not().nonzero().flatten().tolist():
            squares[i] = _look_again(flat, chunks[i].tolist(), coefficient, found)
    none = torch.zeros(count, dtype=torch.float64, device="cpu")
    each = none.index_add_(0, chunks[:, 0], squares)
    kinds = torch.tensor(found.kinds, dtype=torch.int32, device="cpu")
    first_bad = torch.tensor(found.first_bad, dtype=torch.int64, device="cpu")
    return inspection_of(each, kinds, first_bad, any(found.kinds), coefficient, limit)


def inspection_of(
    square_sum: Tensor,
    kinds: Tensor,
    first_bad: Tensor,
    overflow: bool,
    coefficient: Tensor,
    limit: float,
) -> Inspection:
    """Returns the inspection of gradients whose parts are known.

    Args:
        square_sum: See `Inspection`, also for the next two.
        kinds: See there.
        first_bad: See there.
        overflow: Whether any of `kinds` is set.
        coefficient: 0-d float32, what unscales.
        limit: Of the norm of the unscaled gradients.
    """
    norm = math.sqrt(math.fsum(square_sum.tolist()))
    clip = 1.0 if overflow else min(limit / (norm + 1e-6), 1.0)
    numbers = array("f", (norm, float(coefficient) * clip))
    grad_norm, clipped = torch.frombuffer(numbers, dtype=torch.float32).unbind()
    found_inf = torch.zeros((), dtype=torch.int32, device="cpu")
    if overflow:
        found_inf.fill_(1)
    return Inspection(
        kinds=kinds,
        first_bad=first_bad,
        square_sum=square_sum,
        largest=None,
        found_inf=found_inf,
        grad_norm=grad_norm,
        coefficient=clipped,
        unscale=coefficient,
    )


@dataclass(frozen=True)
class _Found:
    """What is in each gradient times the coefficient: see `Inspection`."""

    kinds: list[int]
    first_bad: list[int]


def _look_again(
    flat: Sequence[Tensor], chunk: list[int], coefficient: Tensor, found: _Found
) -> float:
    """Returns the sum of squares of a chunk, unscaled; notes what is not finite."""
    index, start, stop = chunk
    values, factor = memory_order(flat[index])[start:stop], float(coefficient)
    square = _wide_square_sum(values)
    length = math.sqrt(square) * abs(factor)
    if (square == 0.0 and math.isfinite(factor)) or _SHORTEST < length < _LONGEST:
        return square * factor * factor
    exact = _inspection.inspect([values], coefficient, None)
    first_bad = int(exact.first_bad)
    found.kinds[index] |= int(exact.kinds)
    if found.first_bad[index] == -1 and first_bad != -1:
        found.first_bad[index] = start + first_bad
    return float(exact.square_sum)


def _square_sums(flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns chunks, and the float32 sum of squares of each."""
    sizes = [grad.numel() for grad in flat]
    scratch = new_scratch(sizes)
    chunks: list[tuple[int, int, int]] = []
    sums: list[Tensor] = []
    for block in blocks(sizes):
        here = layout(block, scratch)
        copy_all(here, cut(flat, block))
        squares = scratch[: sum(part.numel() for part in here)]
        squares.mul_(squares)
        sums += [part.sum() for part in here]
        chunks += [(piece.index, piece.start, piece.stop) for piece in block]
    table = torch.tensor(chunks, dtype=torch.int64, device="cpu").view(-1, 3)
    return table, torch.stack([torch.zeros((), device="cpu"), *sums])[1:].double()


def _wide_square_sum(values: Tensor) -> float:
    """Returns the sum of squares, in float64: infinite or NaN only if an element is."""
    parts = (part.double() for part in torch.split(values, _WIDE))
    return sum(float(part.mul_(part).sum()) for part in parts)
