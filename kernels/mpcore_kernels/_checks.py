"""What launchers demand of their arguments, all of it checked before anything is written.

Kernels reach tensors by bare address, so a wrong dtype, device or layout would not fail: it would
read or write the wrong memory. None of these checks waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor


def check_device(kernel: object, device: torch.device) -> None:
    """Raises unless `kernel` can dereference addresses of `device`."""
    if isinstance(kernel, triton.JITFunction):
        if device.type != "cuda":
            raise ValueError(
                f"tensors: expected a CUDA or ROCm device, got {device}. Use the reference "
                "backend, or set TRITON_INTERPRET=1 before mpcore_kernels is imported."
            )
    elif device.type != "cpu":
        raise ValueError(
            f"tensors: expected a CPU device because the kernels are interpreted, got {device}. "
            "Unset TRITON_INTERPRET before mpcore_kernels is imported."
        )


def check_state(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device | None = None,
) -> None:
    """Raises unless `tensor` is contiguous and has this dtype, shape and device (None: any)."""
    if not isinstance(tensor, Tensor):
        raise _not_a_tensor(name, tensor)
    wrong = tensor.dtype != dtype or tuple(tensor.shape) != shape or not _is_plain(tensor)
    if wrong or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} tensor of shape {list(shape)}, got "
            f"{_describe(tensor)}. Allocate it so."
        )
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, got {tensor.device}. Move it there."
        )


def check_tensors(
    name: str, tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raises unless all `tensors` are dense, of one of `dtypes`, and on `device`."""
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise _not_a_tensor(f"{name}[{index}]", tensor)
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"{name}[{index}]: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}. "
                "Cast it first."
            )
        if tensor.device != device:
            raise ValueError(
                f"{name}[{index}]: expected a tensor on {device}, got {tensor.device}. "
                "Call once per device."
            )
        if not _is_plain(tensor) or not _is_dense(tensor):
            raise ValueError(
                f"{name}[{index}]: expected a dense tensor (one address per element, no gaps), "
                f"got {_describe(tensor)}. Pass a contiguous copy."
            )
        # wrappers around other tensors, and fake tensors: a kernel would write to address 0
        if tensor.data_ptr() == 0 and tensor.numel() != 0:
            raise ValueError(
                f"{name}[{index}]: expected a tensor that holds memory, got a "
                f"{type(tensor).__name__} that holds none. Pass the tensor inside it."
            )


def check_pairs(
    first_name: str, firsts: Sequence[Tensor], second_name: str, seconds: Sequence[Tensor]
) -> None:
    """Raises unless `seconds` match `firsts` in number and, one by one, in shape and layout."""
    if len(seconds) != len(firsts):
        raise ValueError(
            f"{second_name}: expected {len(firsts)} tensors, one for each of {first_name}, "
            f"got {len(seconds)}. Pass lists of one length."
        )
    for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if not _same_layout(first, second):
            raise ValueError(
                f"{second_name}[{index}]: expected the layout of {first_name}[{index}], "
                f"{_describe(first)}, got {_describe(second)}. "
                f"Allocate it with torch.empty_like."
            )


def check_no_overlap(
    written_name: str, written: Sequence[Tensor], read_name: str = "", read: Sequence[Tensor] = ()
) -> None:
    """Raises if a written tensor shares memory with another one, written or read.

    Programs run in any order, so such a tensor would hold whatever the last one left.
    """
    spans = [_span(tensor, True, index) for index, tensor in enumerate(written)]
    spans += [_span(tensor, False, index) for index, tensor in enumerate(read)]
    furthest = furthest_written = (0, 0, False, 0)
    # zero-sized tensors have address 0 and thus come first, in the way of none
    for span in sorted(spans):
        start, end, is_written, _ = span
        other = furthest if is_written else furthest_written
        if start < other[1]:
            names = [
                f"{written_name if is_written else read_name}[{index}]"
                for _, _, is_written, index in (span, other)
            ]
            raise ValueError(
                f"{names[0]}: expected memory of its own, got memory shared with {names[1]}. "
                "Pass every tensor once, and no view of it."
            )
        if end > furthest[1]:
            furthest = span
        if is_written and end > furthest_written[1]:
            furthest_written = span


def _not_a_tensor(name: str, value: object) -> TypeError:
    return TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}.")


def _span(tensor: Tensor, is_written: bool, index: int) -> tuple[int, int, bool, int]:
    """Returns first address, end address, and what the tensor is."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size(), is_written, index


def _is_plain(tensor: Tensor) -> bool:
    """Tells whether the values of `tensor` are what lies at its address, unsparse, not negated."""
    return tensor.layout == torch.strided and not tensor.is_neg()


def _is_dense(tensor: Tensor) -> bool:
    """Tells whether `tensor` fills one stretch of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    # a dimension of size 1 is never stepped along, so its stride says nothing
    for stride, size in sorted(_steps(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_layout(first: Tensor, second: Tensor) -> bool:
    """Tells whether equal indices of two dense tensors are at equal offsets."""
    if first.shape != second.shape:
        return False
    if first.stride() == second.stride() or first.numel() == 0:
        return True
    return _steps(first) == _steps(second)


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns (stride, size) of the dimensions that are stepped along."""
    return [
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size != 1
    ]


def _describe(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return f"{tensor.dtype} of layout {tensor.layout}"
    negated = ", lazily negated" if tensor.is_neg() else ""
    return f"{tensor.dtype} of shape {list(tensor.shape)}, strides {list(tensor.stride())}{negated}"
