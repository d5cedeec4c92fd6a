"""Widen 16-bit weights to FP32 masters: exact, the way back of `cast_into`.

    master = float32(weight)

Every 16-bit value, subnormals included, is a float32 value, so nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcore_kernels._cache import TableCache, cached
from mpcore_kernels._checks import check_device, check_no_overlap, check_pairs, check_tensors
from mpcore_kernels._dtypes import FORMATS, narrow, pointer, widen
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
def _widen_block(
    weight_ptr, master_ptr, count, WEIGHT: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Widens the first `count` of BLOCK elements (None: all)."""
    offsets = tl.arange(0, BLOCK)
    mask = None if count is None else offsets < count
    bits = tl.load(weight_ptr + offsets, mask=mask, other=None if count is None else 0)
    tl.store(master_ptr + offsets, narrow(widen(bits, WEIGHT), MASTER), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["entries_ptr", "owners_ptr"])
def _widen_kernel(
    entries_ptr,  # *i64  [tensors, 5]  in: _table.py
    owners_ptr,  # *i64  [programs]    in: _table.py
    WEIGHT: tl.constexpr,  # f16 | bf16, what the table's sources hold
    MASTER: tl.constexpr,  # f32, what the table's destinations hold
    CHUNK: tl.constexpr,
    ROUND: tl.constexpr,  # what is masked at a time
):
    """Writes the weights of one chunk as float32.

    Grid:     (chunks,); a program owns elements [start, start + CHUNK) of one tensor.
    Masks:    full chunks at aligned addresses have none. In the others, lanes at or past the
              tensor's end load +0 and store nothing.
    Numerics: load -> FP32 (exact) -> store. No arithmetic.
    Order:    programs are independent.
    """
    weight, master, start, size, _ = locate(entries_ptr, owners_ptr, CHUNK)
    aligned = is_aligned(weight, WEIGHT, MASTER) & is_aligned(master, MASTER, WEIGHT)
    if aligned & (start + CHUNK <= size):
        weight_ptr = aligned_pointer(weight, start, WEIGHT, MASTER)
        master_ptr = aligned_pointer(master, start, MASTER, WEIGHT)
        _widen_block(weight_ptr, master_ptr, None, WEIGHT, MASTER, CHUNK)
    else:
        weight_ptr = pointer(weight, WEIGHT) + start
        master_ptr = pointer(master, MASTER) + start
        count = tl.minimum(size - start, CHUNK).to(tl.int32)
        for at in range(0, count, ROUND):
            _widen_block(weight_ptr + at, master_ptr + at, count - at, WEIGHT, MASTER, ROUND)


def variant(source: torch.dtype, destination: torch.dtype) -> Variant:
    """Returns how the kernel is launched on a table of these dtypes."""
    return Variant(
        kernel=_widen_kernel,
        arguments=("*i64", "*i64"),
        constants=(
            ("WEIGHT", FORMATS[source]),
            ("MASTER", FORMATS[destination]),
            ("CHUNK", CHUNK),
            ("ROUND", ROUND),
        ),
        num_warps=WARPS,
        # no arithmetic: nothing to fuse, and nothing may appear
        enable_fp_fusion=False,
        reads=(source,),
        writes=(destination,),
        chunk=CHUNK,
    )


def variants() -> list[Variant]:
    """Returns every variant that `widen_into` can use."""
    return [variant(dtype, torch.float32) for dtype in _HALVES]


def widen_into(
    weights: Sequence[Tensor], masters: Sequence[Tensor], *, tables: TableCache | None = None
) -> None:
    """Writes 16-bit weights as FP32 masters on their device, without a host sync.

    One launch per dtype among `weights`, whatever their number. The launch writes by address;
    autograd is told so by raising the version counters of `masters`.

    Args:
        weights: float16 and bfloat16 tensors of any shape, dense in any order of dimensions. Left
            as they are. May be empty.
        masters: One float32 tensor per weight, of the same shape and strides, sharing no memory
            with another or with a weight. Overwritten with the same values.
        tables: Where to keep what describes the tensors to the device; None: nowhere.

    Raises:
        TypeError: If an argument that should be a tensor is none.
        ValueError: If a dtype, shape, layout or device is not one of the above, or the device
            cannot run the kernels. Nothing is written then.
        RuntimeError: If a CUDA graph is being captured and `tables` does not know the tensors.

    Example:
        >>> weights = [torch.tensor([1.0, 6.0e-8, float("inf")], dtype=torch.float16)]
        >>> masters = [torch.empty(3)]
        >>> widen_into(weights, masters)
        >>> masters[0].tolist()
        [1.0, 5.960464477539063e-08, inf]
    """
    if len(weights) == 0 and len(masters) == 0:
        return
    device = _device_of(weights)
    check_device(_widen_kernel, device)

    def make() -> list[Table]:
        check_tensors("weights", weights, _HALVES, device)
        check_tensors("masters", masters, (torch.float32,), device)
        check_pairs("weights", weights, "masters", masters)
        check_no_overlap("masters", masters, "weights", weights)
        return build(weights, masters)

    for table in cached(tables, "widen_into", [weights, masters], device, make):
        variant(table.source, table.destination).launch(table.programs, table.entries, table.owners)
    mark_written(*masters)


def _device_of(weights: Sequence[Tensor]) -> torch.device:
    """Returns the device of the first tensor, to which the others are held."""
    first = weights[0] if weights else None
    if not isinstance(first, Tensor):
        raise TypeError(f"weights[0]: expected a torch.Tensor, got {type(first).__name__}.")
    return first.device
