"""Unscale gradients, in place or into FP32 copies, and find the tensors that overflowed.

    out = round(float32(grad) * coefficient)
    nonfinite[i] = nonfinite[i] or any(out of tensor i is infinite or NaN)

`coefficient` is the reciprocal of the loss scale, or that times a clip factor. `round` is to
nearest even where `out` is a 16-bit tensor and nothing where it is FP32.

Looking at `out` alone is enough to see an overflow at every stage: an infinite or NaN gradient
makes every product infinite or NaN, and rounding keeps those.

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.
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
from mpcore_kernels._dtypes import (
    FORMATS,
    is_nonfinite,
    magnitude_of,
    narrow_product,
    pointer,
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


@triton.jit
def _unscale_block(
    grad_ptr,
    out_ptr,
    count,
    coefficient,
    GRAD: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unscales the first `count` of BLOCK elements (None: all); returns the magnitudes stored."""
    offsets = tl.arange(0, BLOCK)
    mask = None if count is None else offsets < count
    bits = tl.load(grad_ptr + offsets, mask=mask, other=None if count is None else 0)
    out = narrow_product(widen(bits, GRAD) * coefficient, OUT)
    tl.store(out_ptr + offsets, out, mask=mask)
    return magnitude_of(out, OUT)


# a kernel must not be compiled anew because a 0-d argument is a view at another offset
@triton.jit(
    do_not_specialize_on_alignment=["entries_ptr", "owners_ptr", "coefficient_ptr", "nonfinite_ptr"]
)
def _unscale_kernel(
    entries_ptr,  # *i64  [tensors, 5]  in: _table.py
    owners_ptr,  # *i64  [programs]    in: _table.py
    coefficient_ptr,  # *f32  []            in
    nonfinite_ptr,  # *i32  [grads]       in/out, only ever raised 0 -> 1
    GRAD: tl.constexpr,  # f16 | bf16 | f32, what the table's sources hold
    OUT: tl.constexpr,  # f32 or GRAD, what the table's destinations hold
    CHUNK: tl.constexpr,
    ROUND: tl.constexpr,  # what is masked at a time
):
    """Writes gradient times coefficient for one chunk; flags its tensor if that is non-finite.

    Grid:     (chunks,); a program owns elements [start, start + CHUNK) of one tensor.
    Masks:    full chunks at aligned addresses have none. In the others, lanes at or past the
              tensor's end load +0, store nothing, and cannot raise a flag of their own: +0 times
              the coefficient is non-finite only if every product is.
    Numerics: load -> FP32 (exact) -> one FP32 multiply -> round to nearest even -> store. Nothing
              is added, so nothing can be contracted. The flag tests the bits that are stored: the
              largest magnitude among them tells.
    Order:    programs are independent. A flag is raised by a plain store: all writers of a flag
              write 1 and nobody reads it, so their order cannot be seen.
    """
    grad, out, start, size, index = locate(entries_ptr, owners_ptr, CHUNK)
    coefficient = tl.load(coefficient_ptr)
    if is_aligned(grad, GRAD, OUT) & is_aligned(out, OUT, GRAD) & (start + CHUNK <= size):
        grad_ptr = aligned_pointer(grad, start, GRAD, OUT)
        out_ptr = aligned_pointer(out, start, OUT, GRAD)
        block = _unscale_block(grad_ptr, out_ptr, None, coefficient, GRAD, OUT, BLOCK=CHUNK)
        largest = tl.max(block, axis=0)
    else:
        grad_ptr = pointer(grad, GRAD) + start
        out_ptr = pointer(out, OUT) + start
        count = tl.minimum(size - start, CHUNK).to(tl.int32)
        lanes = tl.zeros((ROUND,), tl.int32)
        for at in range(0, count, ROUND):
            block = _unscale_block(
                grad_ptr + at, out_ptr + at, count - at, coefficient, GRAD, OUT, BLOCK=ROUND
            )
            lanes = tl.maximum(lanes, block)
        largest = tl.max(lanes, axis=0)
    # infinities and NaNs have larger magnitudes than every number
    if is_nonfinite(largest, OUT):
        tl.store(nonfinite_ptr + index, 1)


def variant(source: torch.dtype, destination: torch.dtype) -> Variant:
    """Returns how the kernel is launched on a table of these dtypes."""
    return Variant(
        kernel=_unscale_kernel,
        arguments=("*i64", "*i64", "*fp32", "*i32"),
        constants=(
            ("GRAD", FORMATS[source]),
            ("OUT", FORMATS[destination]),
            ("CHUNK", CHUNK),
            ("ROUND", ROUND),
        ),
        num_warps=WARPS,
        # one multiplication, no addition: there is nothing to fuse, and nothing may appear
        enable_fp_fusion=False,
        reads=(source,),
        writes=(destination,),
        chunk=CHUNK,
        results=(torch.int32,),
        reductions=1,
    )


def variants() -> list[Variant]:
    """Returns every variant that the launchers below can use: in place, then into FP32."""
    in_place = [variant(dtype, dtype) for dtype in FORMATS]
    return in_place + [variant(dtype, torch.float32) for dtype in FORMATS if dtype.itemsize < 4]


def _launch(tables: list[Table], coefficient: Tensor, nonfinite: Tensor) -> None:
    """Queues one launch per table on the current stream of the tensors' device."""
    for table in tables:
        variant(table.source, table.destination).launch(
            table.programs, (table.entries, table.owners, coefficient, nonfinite)
        )


def _check_state(grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
    """Raises unless what belongs to no single gradient is as documented for both launchers."""
    check_state("coefficient", coefficient, torch.float32, ())
    device = coefficient.device
    check_device(_unscale_kernel, device)
    check_state("nonfinite", nonfinite, torch.int32, (len(grads),), device)


def unscale_(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    nonfinite: Tensor,
    *,
    tables: TableCache | None = None,
) -> None:
    """Multiplies gradients by `coefficient` in place, on their device, without a host sync.

    One launch per dtype among `grads`, whatever their number. The launch writes by address;
    autograd is told so by raising the version counters of `grads` and `nonfinite`.

    Args:
        grads: Gradients of any shape, float16, bfloat16 or float32 in any mixture, dense in any
            order of dimensions, none sharing memory with another. Overwritten with
            `round(float32(grad) * coefficient)`, to nearest even. May be empty.
        coefficient: `[]`, float32. The factor, `1 / loss_scale`.
        nonfinite: `[len(grads)]`, int32, contiguous. Element `i` is set to 1 if tensor `i` holds
            a value that is infinite or NaN before or after the multiplication or after rounding
            to 16 bits; never cleared.
        tables: Where to keep what describes the tensors to the device; None: nowhere.

    Raises:
        TypeError: If an argument that should be a tensor is none.
        ValueError: If a dtype, shape, layout or device is not one of the above, or the device
            cannot run the kernels. Nothing is written then.
        RuntimeError: If a CUDA graph is being captured and `tables` does not know the tensors.

    Example:
        >>> grads = [torch.tensor([2.0, 6.0], dtype=torch.float16), torch.tensor([float("inf")])]
        >>> nonfinite = torch.zeros(2, dtype=torch.int32)
        >>> unscale_(grads, torch.tensor(0.5), nonfinite)
        >>> grads[0].tolist(), nonfinite.tolist()
        ([1.0, 3.0], [0, 1])
    """
    _check_state(grads, coefficient, nonfinite)
    device = coefficient.device

    def make() -> list[Table]:
        check_tensors("grads", grads, tuple(FORMATS), device)
        check_no_overlap("grads", grads)
        return build(grads, grads)

    _launch(cached(tables, "unscale_", [grads], device, make), coefficient, nonfinite)
    mark_written(*grads, nonfinite)


def unscale_into(
    grads: Sequence[Tensor],
    outs: Sequence[Tensor],
    coefficient: Tensor,
    nonfinite: Tensor,
    *,
    tables: TableCache | None = None,
) -> None:
    """Writes gradients times `coefficient` as FP32, on their device, without a host sync.

    One launch per dtype among `grads`, whatever their number. The launch writes by address;
    autograd is told so by raising the version counters of `outs` and `nonfinite`.

    Args:
        grads: Gradients of any shape, float16, bfloat16 or float32 in any mixture, dense in any
            order of dimensions. Left as they are. May be empty.
        outs: One float32 tensor per gradient, of the same shape and strides, sharing no memory
            with another or with a gradient. Overwritten with `float32(grad) * coefficient`.
        coefficient: `[]`, float32. The factor, `1 / loss_scale`.
        nonfinite: `[len(grads)]`, int32, contiguous. Element `i` is set to 1 if tensor `i` holds
            a value that is infinite or NaN before or after the multiplication; never cleared.
        tables: Where to keep what describes the tensors to the device; None: nowhere.

    Raises:
        TypeError: If an argument that should be a tensor is none.
        ValueError: If a dtype, shape, layout or device is not one of the above, or the device
            cannot run the kernels. Nothing is written then.
        RuntimeError: If a CUDA graph is being captured and `tables` does not know the tensors.

    Example:
        >>> grads = [torch.tensor([2.0, 6.0e-8], dtype=torch.float16)]
        >>> outs = [torch.empty(2)]
        >>> nonfinite = torch.zeros(1, dtype=torch.int32)
        >>> unscale_into(grads, outs, torch.tensor(0.5), nonfinite)
        >>> outs[0].tolist(), nonfinite.tolist()
        ([1.0, 2.9802322387695312e-08], [0])
    """
    _check_state(grads, coefficient, nonfinite)
    device = coefficient.device

    def make() -> list[Table]:
        check_tensors("grads", grads, tuple(FORMATS), device)
        check_tensors("outs", outs, (torch.float32,), device)
        check_pairs("grads", grads, "outs", outs)
        check_no_overlap("outs", outs, "grads", grads)
        return build(grads, outs)

    _launch(cached(tables, "unscale_into", [grads, outs], device, make), coefficient, nonfinite)
    mark_written(*outs, nonfinite)
