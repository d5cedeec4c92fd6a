"""`inspect` of the compiled backend: one pass for sums of squares, then as on the cpu backend."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mpcore.backends import _cpu_inspection, _inspection
from mpcore.backends._blocks import all_in_memory_order
from mpcore.backends._c_compiler import declared, passes
from mpcore.backends._c_scalars import prepare_
from mpcore.backends._c_statistics import with_statistics
from mpcore.backends._c_update import Plan
from mpcore.backends._c_work import DTYPES, Cut, Work, by_dtype, cut_chunks, run
from mpcore.backends._inspection import Inspection
from mpcore.base import GradientSet, Kinds
from mpcore.updates import Hyper


class _Totals(ctypes.Structure):
    """`totals_t` of `_passes.c`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("chunks", "sums")),
        *((name, ctypes.c_int64) for name in ("count", "tensors")),
        ("coefficient", ctypes.c_double),
        ("bounds", ctypes.c_double * 4),
        *((name, ctypes.c_void_p) for name in ("squares", "first_bad", "kinds")),
    ]


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
    """Finds overflow, norms and the clip; CPU tensors.

    The promises of the cpu backend's `inspect`, and other bits of the norm.
    `reference.inspect` documents the arguments.
    """
    limit = _inspection.rounded_max_norm(max_norm)
    grads = GradientSet.of(grads)
    if plan is not None and hyper is not None:
        prepare_(plan, hyper)
    unscale = coefficient.reciprocal() if inverted else coefficient
    alike = None if grads.kinds is None else _alike(grads.kinds)
    if alike is not None:
        flat = grads
        chunks, sums = alike[1].chunks, _sums_of(*alike, flat.pointers)
    else:
        _inspection.check_dtypes(grads)
        flat = all_in_memory_order(grads)
        chunks, sums = _square_sums(flat)
    found = _summed_up(chunks, sums, len(flat), unscale, limit)
    if found is None:
        found = _cpu_inspection.conclude(flat, chunks, sums, unscale, limit)
    return with_statistics(found, flat, unscale) if statistics else found


@lru_cache(maxsize=16)  # of a model they are the same at every step
def _alike(kinds: Kinds) -> tuple[torch.dtype, Cut] | None:
    """Returns dtype and cut of gradients of one dtype in the order of memory, None of others."""
    if len(kinds.dtypes) != 1 or not kinds.dtypes <= DTYPES.keys() or not kinds.are_contiguous:
        return None
    return next(iter(kinds.dtypes)), cut_chunks(kinds.sizes)


def _square_sums(flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns chunks, and the sum of squares of each."""
    whole = cut_chunks(GradientSet.of(flat).sizes)
    parts = [(part[1].chunks, _sums_of(*part)) for part in by_dtype(flat, whole)]
    if len(parts) == 1:
        return parts[0]
    none = torch.empty(0, dtype=torch.float64, device="cpu")
    tables, each = [whole.chunks[:0], *(t for t, _ in parts)], [none, *(s for _, s in parts)]
    return torch.cat(tables), torch.cat(each)


def _sums_of(dtype: torch.dtype, cut: Cut, addresses: array[int]) -> Tensor:
    """Returns the sum of squares of each chunk of gradients of one dtype."""
    sums = torch.empty(cut.chunks.shape[0], dtype=torch.float64, device="cpu")
    work = Work(sums=sums.data_ptr())
    work.take_up(dtype, cut, addresses)
    run(passes().square_sums, work)
    return sums


def _summed_up(
    chunks: Tensor, sums: Tensor, count: int, coefficient: Tensor, limit: float
) -> Inspection | None:
    """Returns what `conclude` would, without its many small operations; None: look again."""
    squares = torch.empty(count, dtype=torch.float64, device="cpu")
    kinds = torch.empty(count, dtype=torch.int32, device="cpu")
    first_bad = torch.empty(count, dtype=torch.int64, device="cpu")
    totals = _Totals(
        chunks=chunks.data_ptr(),
        sums=sums.data_ptr(),
        count=sums.shape[0],
        tensors=count,
        coefficient=float(coefficient),
        bounds=_cpu_inspection.BOUNDS,
        squares=squares.data_ptr(),
        first_bad=first_bad.data_ptr(),
        kinds=kinds.data_ptr(),
    )
    sum_up = declared("sum_up", ctypes.c_int64, ctypes.c_void_p)
    if sum_up(ctypes.addressof(totals)):  # chunks that tell too little
        return None
    return _cpu_inspection.inspection_of(squares, kinds, first_bad, False, coefficient, limit)
