"""Cast FP32 masters to 16-bit weights: nearest even, saturating, and not at all after an overflow.

    weight = round(clamp(master))     if found_inf == 0, else weight stays

`clamp` replaces a finite value that would round to infinity by the largest finite value of its
sign. Infinities and NaNs pass, so that a broken master stays visible in its weight.

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1.
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
from mpcore_kernels._dtypes import FORMATS, narrow, pointer, saturate, widen
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


@triton.jit
def _cast_block(
    master_ptr, weight_ptr, count, MASTER: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Casts the first `count` of BLOCK elements (None: all); returns 1 where one was clamped."""
    offsets = tl.arange(0, BLOCK)
    mask = None if count is None else offsets < count
    bits = tl.load(master_ptr + offsets, mask=mask, other=None if count is None else 0)
    master, clamped = saturate(widen(bits, MASTER), WEIGHT)
    tl.store(weight_ptr + offsets, narrow(master, WEIGHT), mask=mask)
    return clamped.to(tl.int32)


# a kernel must not be compiled anew because a 0-d argument is a view at another offset
@triton.jit(
    do_not_specialize_on_alignment=["entries_ptr", "owners_ptr", "found_inf_ptr", "saturated_ptr"]
)
def _cast_kernel(
    entries_ptr,  # *i64  [tensors, 5]  in: _table.py
    owners_ptr,  # *i64  [programs]    in: _table.py
    found_inf_ptr,  # *i32  []            in
    saturated_ptr,  # *i64  []            in/out, added to
    MASTER: tl.constexpr,  # f32, what the table's sources hold
    WEIGHT: tl.constexpr,  # f16 | bf16, what the table's destinations hold
    CHUNK: tl.constexpr,
    ROUND: tl.constexpr,  # what is masked at a time
):
    """Writes the rounded, clamped masters of one chunk and counts the clamped, unless found_inf.

    Grid:     (chunks,); a program owns elements [start, start + CHUNK) of one tensor.
    Masks:    full chunks at aligned addresses have none. In the others, lanes at or past the
              tensor's end load +0, which is not clamped, and store nothing.
    Numerics: load -> clamp on the bits -> round to nearest even -> store. No arithmetic but the
              rounding, nothing to contract.
    Order:    programs are independent. The count is a sum of integers by an atomic addition, which
              commutes, so the total does not depend on the order.
    """
    if tl.load(found_inf_ptr) == 0:
        master, weight, start, size, _ = locate(entries_ptr, owners_ptr, CHUNK)
        aligned = is_aligned(master, MASTER, WEIGHT) & is_aligned(weight, WEIGHT, MASTER)
        if aligned & (start + CHUNK <= size):
            master_ptr = aligned_pointer(master, start, MASTER, WEIGHT)
            weight_ptr = aligned_pointer(weight, start, WEIGHT, MASTER)
            block = _cast_block(master_ptr, weight_ptr, None, MASTER, WEIGHT, CHUNK)
            clamped = tl.sum(block, axis=0)
        else:
            master_ptr = pointer(master, MASTER) + start
            weight_ptr = pointer(weight, WEIGHT) + start
            count = tl.minimum(size - start, CHUNK).to(tl.int32)
            lanes = tl.zeros((ROUND,), tl.int32)
            for at in range(0, count, ROUND):
                lanes += _cast_block(
                    master_ptr + at, weight_ptr + at, count - at, MASTER, WEIGHT, ROUND
                )
            clamped = tl.sum(lanes, axis=0)
        if clamped != 0:
            # relaxed: nothing else is published along with the count
            tl.atomic_add(saturated_ptr, clamped.to(tl.int64), sem="relaxed")


def variant(source: torch.dtype, destination: torch.dtype) -> Variant:
    """Returns how the kernel is launched on a table of these dtypes."""
    return Variant(
        kernel=_cast_kernel,
        arguments=("*i64", "*i64", "*i32", "*i64"),
        constants=(
            ("MASTER", FORMATS[source]),
            ("WEIGHT", FORMATS[destination]),
            ("CHUNK", CHUNK),
            ("ROUND", ROUND),
        ),
        num_warps=WARPS,
        # no floating-point arithmetic but the conversion: nothing to fuse, and nothing may appear
        enable_fp_fusion=False,
        reads=(source,),
        writes=(destination,),
        chunk=CHUNK,
        counters=(1,),
        reductions=1,
    )


def variants() -> list[Variant]:
    """Returns every variant that `cast_into` can use."""
    return [variant(torch.float32, dtype) for dtype in FORMATS if dtype.itemsize < 4]


def _launch(tables: list[Table], found_inf: Tensor, saturated: Tensor) -> None:
    """Queues one launch per table on the current stream of the tensors' device."""
    for table in tables:
        variant(table.source, table.destination).launch(
            table.programs, (table.entries, table.owners, found_inf, saturated)
        )


def cast_into(
    masters: Sequence[Tensor],
    weights: Sequence[Tensor],
    found_inf: Tensor,
    saturated: Tensor,
    *,
    tables: TableCache | None = None,
) -> None:
    """Rounds FP32 masters into 16-bit weights on their device, without a host sync.

    One launch per dtype among `weights`, whatever their number. The launch writes by address;
    autograd is told so by raising the version counters of `weights` and `saturated`, also when
    `found_inf` turns out to be set: the host does not know.

    Args:
        masters: float32 tensors of any shape, dense in any order of dimensions. May be empty.
        weights: One float16 or bfloat16 tensor per master, of the same shape and strides, sharing
            no memory with another or with a master. Overwritten with the master rounded to nearest
            even. A finite master that would round to infinity gives the largest finite value
            with its sign; infinities and NaNs are kept.
        found_inf: `[]`, int32. If not 0, no weight is written and nothing is counted.
        saturated: `[]`, int64. The number of clamped values is added to it.
        tables: Where to keep what describes the tensors to the device; None: nowhere.

    Raises:
        TypeError: If an argument that should be a tensor is none.
        ValueError: If a dtype, shape, layout or device is not one of the above, or the device
            cannot run the kernels. Nothing is written then.
        RuntimeError: If a CUDA graph is being captured and `tables` does not know the tensors.

    Example:
        >>> masters = [torch.tensor([1.0, 65519.0, -1.0e6])]
        >>> weights = [torch.empty(3, dtype=torch.float16)]
        >>> found_inf = torch.tensor(0, dtype=torch.int32)
        >>> saturated = torch.tensor(0)
        >>> cast_into(masters, weights, found_inf, saturated)
        >>> weights[0].tolist(), saturated.item()
        ([1.0, 65504.0, -65504.0], 1)
    """
    check_state("found_inf", found_inf, torch.int32, ())
    device = found_inf.device
    check_device(_cast_kernel, device)
    check_state("saturated", saturated, torch.int64, (), device)

    def make() -> list[Table]:
        check_tensors("masters", masters, (torch.float32,), device)
        check_tensors("weights", weights, (torch.float16, torch.bfloat16), device)
        check_pairs("masters", masters, "weights", weights)
        check_no_overlap("weights", weights, "masters", masters)
        return build(masters, weights)

    _launch(cached(tables, "cast_into", [masters, weights], device, make), found_inf, saturated)
    mark_written(*weights, saturated)
