"""`inspect` of the cpu backend: one read of the gradients, a dot product per chunk.

A chunk whose sum of squares is an ordinary float32 number is finite. Any other chunk (overflow, or
squares too small or too large for float32) sends its whole tensor to the reference backend, which
tells exactly what is in it. So `kinds`, `first_bad` and `found_inf` are bitwise those of the
reference backend, and sums of squares are float32 dot products of at most 2^17 elements, summed in
float64: their bits may depend on the number of threads and on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends import _inspection
from mpcore.backends._blocks import blocks, copy_all, cut, layout, memory_order, new_scratch
from mpcore.backends._cpu_update import Plan, prepare_
from mpcore.backends._inspection import Inspection
from mpcore.updates import Hyper

# the dot product's rounding error grows with its length
_DOT = 2**17
# sums of squares between these have lost nothing to underflow that would count, and overflowed not
_SMALLEST, _LARGEST = 2.0**-60, 2.0**120


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

    Args:
        grads: See the reference backend, also for the others.
        coefficient: See there.
        max_norm: See there.
        statistics: Whether to fill `counts`, `histogram` and `largest`, which is None otherwise:
            finding the largest would cost more than all the rest.
        plan: See there.
        hyper: See there.

    Raises:
        ArgumentError: See there.
    """
    if plan is not None and hyper is not None:
        prepare_(plan, hyper)
    if statistics:
        return _inspection.inspect(grads, coefficient, max_norm, statistics=True)
    limit = float(torch.tensor(_inspection.check_max_norm(max_norm)))  # rounded to float32
    _inspection.check_dtypes(grads)
    factor = float(coefficient)
    sums = _square_sums([memory_order(grad) for grad in grads], factor)
    kinds = torch.zeros(len(grads), dtype=torch.int32)
    first_bad = torch.full((len(grads),), -1, dtype=torch.int64)
    for index, total in enumerate(sums):
        if total is None:
            exact = _inspection.inspect([grads[index]], coefficient, None)
            kinds[index], first_bad[index] = exact.kinds[0], exact.first_bad[0]
            sums[index] = float(exact.square_sum)
    square_sum = torch.tensor(sums, dtype=torch.float64)
    norm = math.sqrt(math.fsum(square_sum.tolist()))
    found = bool(kinds.any())
    clip = 1.0 if found else min(limit / (norm + 1e-6), 1.0)
    return Inspection(
        kinds=kinds,
        first_bad=first_bad,
        square_sum=square_sum,
        largest=None,
        found_inf=torch.tensor(int(found), dtype=torch.int32),
        grad_norm=torch.tensor(norm, dtype=torch.float64).float(),
        coefficient=torch.tensor(factor * clip, dtype=torch.float64).float(),
    )


def _square_sums(flat: list[Tensor], factor: float) -> list[float | None]:
    """Returns the sum of squares of each tensor times `factor`; None where it cannot be trusted."""
    sums: list[float | None] = [0.0] * len(flat)
    sizes = [grad.numel() for grad in flat]
    scratch = new_scratch(sizes)
    for block in blocks(sizes):
        here = layout(block, scratch)
        copy_all(here, cut(flat, block))
        for piece, values in zip(block, here, strict=True):
            so_far, more = sums[piece.index], _square_sum(values, factor)
            sums[piece.index] = None if so_far is None or more is None else so_far + more
    return sums


def _square_sum(values: Tensor, factor: float) -> float | None:
    """Returns the sum of squares of float32 `values` times `factor`, None if it is in doubt."""
    total = 0.0
    for part in (values,) if values.numel() <= _DOT else torch.split(values, _DOT):
        square = float(torch.dot(part, part))
        if not _SMALLEST < square < _LARGEST and (square != 0.0 or bool(part.any())):
            return None
        total += square
    # no product is longer than all of them together
    return total * factor * factor if math.sqrt(total) * factor < 2.0**127 else None
