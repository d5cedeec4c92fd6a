"""The statistics of the compiled backend: one pass of C that counts, and sums over chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpcore.backends import _inspection
from mpcore.backends._c_compiler import passes
from mpcore.backends._c_work import COUNTS, Work, by_dtype, cut_chunks, run
from mpcore.backends._inspection import Inspection

# biased float32 exponent of the smallest normal number, by dtype of 16 bits or float32
_FIRST_NORMAL = {torch.float16: 113, torch.bfloat16: 1, torch.float32: 1}


@torch.no_grad()
def with_statistics(found: Inspection, flat: Sequence[Tensor], coefficient: Tensor) -> Inspection:
    """Returns an inspection with `counts`, `histogram` and `largest`, bitwise the reference's.

    Args:
        found: What was found without them, which stays as it is.
        flat: The gradients, elements in the order of memory.
        coefficient: 0-d float32.
    """
    rows = torch.zeros(len(flat), COUNTS - 1, dtype=torch.int64, device="cpu")
    largest = torch.zeros(len(flat), dtype=torch.int64, device="cpu")
    for dtype, cut, addresses in by_dtype(flat, cut_chunks([grad.numel() for grad in flat])):
        counts = torch.empty(len(cut.chunks), COUNTS, dtype=torch.int64, device="cpu")
        work = Work()
        work.take_up(dtype, cut, addresses)
        work.counts = counts.data_ptr()
        run(passes().count_values, work)
        rows.index_add_(0, cut.chunks[:, 0], counts[:, :-1])
        largest.scatter_reduce_(0, cut.chunks[:, 0], counts[:, -1], "amax")
    unscaled = largest.to(torch.int32).view(torch.float32) * coefficient.abs()
    kinds = _kinds(rows, [grad.dtype for grad in flat])
    # few have any: NaN and infinities are told apart, and what is not finite when unscaled left out
    odd = (rows[:, 255] > 0) | unscaled.isfinite().logical_not()
    for i in odd.nonzero().flatten().tolist():
        kinds[i] = _inspection.count_kinds([flat[i]], kinds.device)[0]
        sizes = (flat[i].float() * coefficient).abs().reshape(-1)
        finite = torch.where(sizes.isfinite(), sizes, 0.0)
        unscaled[i] = finite.amax() if len(finite) else 0.0
    histogram = rows[:, :256].contiguous()
    return replace(found, largest=unscaled, counts=kinds, histogram=histogram)


def _kinds(rows: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """Returns how many values are NaN, +inf, -inf (told apart later), 0, subnormal, normal."""
    zeros, finite = rows[:, 256], rows[:, :255].sum(1)
    small = none = torch.zeros_like(finite)
    for dtype in dict.fromkeys(dtypes):
        here = torch.tensor([one == dtype for one in dtypes], device="cpu")
        small = torch.where(here, rows[:, : _FIRST_NORMAL[dtype]].sum(1), small)
    return torch.stack([none, none, none, zeros, small - zeros, finite - small], dim=1)
