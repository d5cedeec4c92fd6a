"""`inspect` of the compiled backend: one pass for sums of squares, then as on the cpu backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.backends import _cpu_inspection, _inspection, _update
from mpcore.backends._blocks import all_in_memory_order
from mpcore.backends._c_compiler import passes
from mpcore.backends._c_statistics import with_statistics
from mpcore.backends._c_work import Work, by_dtype, cut_chunks, run
from mpcore.backends._inspection import Inspection
from mpcore.updates import Hyper


@torch.no_grad()
def inspect(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    max_norm: float | None,
    *,
    statistics: bool = False,
    plan: _update.Plan | None = None,
    hyper: Hyper | None = None,
) -> Inspection:
    """Finds overflow, norms and the clip; CPU tensors.

    The promises of the cpu backend's `inspect`, and other bits of the norm.
    `reference.inspect` documents the arguments.
    """
    limit = _inspection.rounded_max_norm(max_norm)
    _inspection.check_dtypes(grads)
    if plan is not None and hyper is not None:
        _update.prepare_(plan, hyper)
    flat = all_in_memory_order(grads)
    chunks, sums = _square_sums(flat)
    found = _cpu_inspection.conclude(flat, chunks, sums, coefficient, limit)
    return with_statistics(found, flat, coefficient) if statistics else found


def _square_sums(flat: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns chunks, and the sum of squares of each."""
    chunks = cut_chunks([grad.numel() for grad in flat])
    tables, sums = [chunks[:0]], [torch.zeros(0, dtype=torch.float64)]
    for dtype, of_dtype, addresses in by_dtype(flat, chunks):
        work = Work()
        work.take_up(dtype, of_dtype, addresses)
        tables.append(of_dtype)
        sums.append(torch.empty(len(of_dtype), dtype=torch.float64))
        work.sums = sums[-1].data_ptr()
        run(passes().square_sums, work)
    return torch.cat(tables), torch.cat(sums)
