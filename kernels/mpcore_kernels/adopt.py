"""Adopt 16-bit weights that somebody else wrote to as FP32 masters, element by element.

    master = float32(weight)     if weight is finite and not round(clamp(master)), else it stays

So an element that nobody touched keeps the digits that only its master has. `round` and `clamp` are
those of `cast_into`. NaNs are equal whatever their bits, zeros of two signs are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcore_kernels._cache import TableCache, cached
from mpcore_kernels._checks import (
    check_device,
    check_no_overlap,
    check_pairs,
    check_state,
    check_tensors,
)
from mpcore_kernels._counters import REFUSED
from mpcore_kernels._dtypes import (
    FORMATS,
    exponent_mask,
    is_nonfinite,
    magnitude_of,
    narrow,
    pointer,
    saturate,
    widen,
)
from mpcore_kernels._launch import Variant
from mpcore_kernels._table import (
    CHUNK,
    ROUND,
    WARPS,
    Table,
    aligned_pointer,
    build,
    is_aligned,
    locate,
    mark_written,
)

_HALVES = (torch.float16, torch.bfloat16)


@triton.jit
def adopted_by(bits, weight, WEIGHT: tl.constexpr, MASTER: tl.constexpr):
    """Returns the bits of masters once the bits of weights are adopted, and what changed.

    That is 1 where an element was adopted, `REFUSED` where it was not because it is not finite.
    """
    rounded, _ = saturate(widen(bits, MASTER), WEIGHT)
    expected = narrow(rounded, WEIGHT)
    infinity: tl.constexpr = exponent_mask(WEIGHT)
    both_nan = (magnitude_of(weight, WEIGHT) > infinity) & (
        magnitude_of(expected, WEIGHT) > infinity
    )
    differs = (weight != expected) & (both_nan == 0)
    refused = differs & is_nonfinite(weight, WEIGHT)
    adopted = differs & (refused == 0)
    master = tl.where(adopted, narrow(widen(weight, WEIGHT), MASTER), bits)
    return master, adopted.to(tl.int32) + refused.to(tl.int32) * REFUSED


@triton.jit
def adopt_block(
    weight_ptr, master_ptr, count, WEIGHT: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns what `adopted_by` does of the first `count` of BLOCK elements (None: all)."""
    offsets = tl.arange(0, BLOCK)
    mask = None if count is None else offsets < count
    other = None if count is None else 0
    weight = tl.load(weight_ptr + offsets, mask=mask, other=other)
    bits = tl.load(master_ptr + offsets, mask=mask, other=other)
    return adopted_by(bits, weight, WEIGHT, MASTER)


@triton.jit(do_not_specialize_on_alignment=["entries_ptr", "owners_ptr", "counts_ptr"])
def _adopt_kernel(
    entries_ptr,  # *i64  [tensors, 5]  in: _table.py
    owners_ptr,  # *i64  [programs]    in: _table.py
    counts_ptr,  # *i64  [weights, 2]  in/out, added to: adopted, refused
    WEIGHT: tl.constexpr,  # f16 | bf16, what the table's sources hold
    MASTER: tl.constexpr,  # f32, what the table's destinations hold
    CHUNK: tl.constexpr,
    ROUND: tl.constexpr,  # what is masked at a time
):
    """Adopts the changed weights of one chunk and counts them by tensor.

    Grid:     (chunks,); a program owns elements [start, start + CHUNK) of one tensor.
    Masks:    full chunks at aligned addresses have none, and store nothing unless an element
              changed. In the others, lanes at or past the tensor's end load +0 of both, which are
              equal, and store nothing; the lanes before store what they loaded where nothing
              changed.
    Numerics: load -> clamp the master on its bits -> round to nearest even -> compare bits; the
              weight as FP32 is exact. No arithmetic but the rounding, nothing to contract.
    Order:    programs are independent. Counts are sums of integers by atomic additions, which
              commute, so the totals do not depend on the order.
    """
    weight, master, start, size, index = locate(entries_ptr, owners_ptr, CHUNK)
    aligned = is_aligned(weight, WEIGHT, MASTER) & is_aligned(master, MASTER, WEIGHT)
    if aligned & (start + CHUNK <= size):
        weight_ptr = aligned_pointer(weight, start, WEIGHT, MASTER)
        master_ptr = aligned_pointer(master, start, MASTER, WEIGHT)
        held, changed = adopt_block(weight_ptr, master_ptr, None, WEIGHT, MASTER, CHUNK)
        found = tl.sum(changed, axis=0)
        if found != 0:
            tl.store(master_ptr + tl.arange(0, CHUNK), held)
    else:
        weight_ptr = pointer(weight, WEIGHT) + start
        master_ptr = pointer(master, MASTER) + start
        count = tl.minimum(size - start, CHUNK).to(tl.int32)
        lanes = tl.zeros((ROUND,), tl.int32)
        for at in range(0, count, ROUND):
            held, changed = adopt_block(
                weight_ptr + at, master_ptr + at, count - at, WEIGHT, MASTER, ROUND
            )
            offsets = tl.arange(0, ROUND)
            tl.store(master_ptr + at + offsets, held, mask=offsets < count - at)
            lanes += changed
        found = tl.sum(lanes, axis=0)
    if found != 0:
        # relaxed: nothing else is published along with the counts
        counter = counts_ptr + 2 * index
        tl.atomic_add(counter, (found % REFUSED).to(tl.int64), sem="relaxed")
        tl.atomic_add(counter + 1, (found // REFUSED).to(tl.int64), sem="relaxed")


def variant(source: torch.dtype, destination: torch.dtype) -> Variant:
    """Returns how the kernel is launched on a table of these dtypes."""
    return Variant(
        kernel=_adopt_kernel,
        arguments=("*i64", "*i64", "*i64"),
        constants=(
            ("WEIGHT", FORMATS[source]),
            ("MASTER", FORMATS[destination]),
            ("CHUNK", CHUNK),
            ("ROUND", ROUND),
        ),
        num_warps=WARPS,
        # no floating-point arithmetic but the conversion: nothing to fuse, and nothing may appear
        enable_fp_fusion=False,
        reads=(source, destination),
        writes=(destination,),
        chunk=CHUNK,
        counters=(1, 1),
        reductions=1,
    )


def variants() -> list[Variant]:
    """Returns every variant that `adopt_` can use."""
    return [variant(dtype, torch.float32) for dtype in _HALVES]


def adopt_(
    weights: Sequence[Tensor],
    masters: Sequence[Tensor],
    counts: Tensor,
    *,
    tables: TableCache | None = None,
) -> None:
    """Makes weights that are not their rounded masters the masters, by element; no host sync.

    One launch per dtype among `weights`, whatever their number. The launch writes by address;
    autograd is told so by raising the version counters of `masters` and `counts`.

    Args:
        weights: float16 and bfloat16 tensors of any shape, dense in any order of dimensions. Left
            as they are. May be empty.
        masters: One float32 tensor per weight, of the same shape and strides, sharing no memory
            with another or with a weight. Elements whose weight has other bits than `cast_into`
            would give it, and is finite, become that weight; NaNs count as equal.
        counts: `[len(weights), 2]`, int64, contiguous. For each tensor the number of elements that
            became masters, and of those that did not because they are not finite, are added.
        tables: Where to keep what describes the tensors to the device; None: nowhere.

    Raises:
        TypeError: If an argument that should be a tensor is none.
        ValueError: If a dtype, shape, layout or device is not one of the above, or the device
            cannot run the kernels. Nothing is written then.
        RuntimeError: If a CUDA graph is being captured and `tables` does not know the tensors.

    Example:
        >>> masters = [torch.tensor([1.0001, 2.0, 3.0])]
        >>> counts = torch.zeros(1, 2, dtype=torch.int64)
        >>> adopt_([torch.tensor([1.0, 5.0, float("inf")]).half()], masters, counts)
        >>> masters[0].tolist(), counts.tolist()
        ([1.000100016593933, 5.0, 3.0], [[1, 1]])
    """
    check_state("counts", counts, torch.int64, (len(weights), 2))
    device = counts.device
    check_device(_adopt_kernel, device)

    def make() -> list[Table]:
        check_tensors("weights", weights, _HALVES, device)
        check_tensors("masters", masters, (torch.float32,), device)
        check_pairs("weights", weights, "masters", masters)
        check_no_overlap("masters", masters, "weights", weights)
        return build(weights, masters)

    for table in cached(tables, "adopt_", [weights, masters], device, make):
        variant(table.source, table.destination).launch(
            table.programs, (table.entries, table.owners, counts)
        )
    mark_written(*masters, counts)
