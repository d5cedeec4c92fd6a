"""16-bit matrix products on a CPU, computed the way a tensor core computes them.

For 16-bit operands a tensor core forms exact products, adds them in FP32 and rounds once:

    out = round16(alpha * sum_k float32(a[i, k]) * float32(b[k, j]) + beta * float32(c[i, j]))

The product of two FP16 values (11 + 11 significand bits) or of two BF16 values (8 + 8 bits) fits
the 24 bits of an FP32 significand, so widening the operands and multiplying in FP32 is the same
thing; only the order of the additions is left open, as it is on the hardware.

Source: NVIDIA, "NVIDIA Tesla V100 GPU Architecture", 2017, "Tensor Cores": FP16 inputs, full
precision products, FP32 accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpcore.errors import StageError

_HALF_TYPES = frozenset({torch.float16, torch.bfloat16})

# one matrix product (or one convolution) each: every floating operand has the result's type
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "mm",
        "bmm",
        "mv",
        "dot",
        "vdot",
        "addmm",
        "addmm_",
        "addmv",
        "addmv_",
        "addbmm",
        "addbmm_",
        "baddbmm",
        "baddbmm_",
        "_addmm_activation",
        "_grouped_mm",
        "_trilinear",
        "convolution",
        "convolution_backward",
    )
)

# several products fused into one kernel, which keeps everything between them in FP32; these also
# take FP32 operands beside the 16-bit ones (a mask, the saved log-sum-exp)
_FUSED = frozenset(
    f"aten::{name}"
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
    )
)

# the others (`mm.dtype`, ...) state a result type of their own; PyTorch has none of them on a CPU
_OVERLOADS = frozenset({"default", "out"})

# outputs that are FP32 whatever the type of the operands
_FLOAT32_OUTPUTS: Mapping[str, frozenset[int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": frozenset({1}),  # log-sum-exp
}


@contextmanager
def emulate_tensor_cores() -> Iterator[None]:
    """Makes this thread's 16-bit matrix products on the CPU round once, from an FP32 sum; no sync.

    Inside the context every FP16 or BF16 product that would reach a CPU kernel (`mm`, `bmm`, `mv`,
    `dot` and their `add` forms, hence `nn.Linear`, `matmul` and `einsum`; convolutions; scaled dot
    product attention) is computed on widened operands in FP32 and rounded once to the 16-bit type,
    to nearest even, overflow giving infinity. Backward passes are covered when `backward()` is
    called inside the context. FP32 and FP64 products, CUDA tensors and everything that is not a
    matrix product are left alone.

    Attention is one fused operation: scores, softmax and the weighted sum stay in FP32, and the
    output alone is rounded, as in fused attention kernels.

    The context is local to the calling thread, may be nested, and works as a decorator. Functions
    compiled by `torch.compile` run uncompiled inside it.

    Raises:
        StageError: If PyTorch is set to multiply FP32 matrices in BF16 on this CPU
            (`torch.set_float32_matmul_precision("medium")`), which would round the operands.

    Example:
        >>> import torch, mpcore
        >>> a = torch.tensor([[1.0, 2.0**-11]], dtype=torch.float16)
        >>> b = torch.tensor([[1.0], [1.5]], dtype=torch.float16)
        >>> with mpcore.emulate_tensor_cores():
        ...     c = a @ b
        >>> c.item() == 1 + 2.0**-10  # 1 + 1.5 * 2^-11, rounded once to 11 bits
        True
    """
    _check_float32_products()
    with _TensorCoreMode():  # type: ignore[no-untyped-call]
        yield


class _TensorCoreMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reroutes the 16-bit CPU products that reach it; hands every other operation through."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _product(func)
        if name is not None:
            dtype = _half_type(name, args, kwargs)
            if dtype is not None:
                return _compute_in_float32(func, name, dtype, args, kwargs)
        elif torch.is_inference_mode_enabled() and _is_composite(func):
            # inference mode skips autograd's level, where composites are normally taken apart
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


@cache  # a model asks for each of its operations
def _product(func: Any) -> str | None:
    """Returns the name of an operation that is emulated for 16-bit operands, None of the others."""
    name: str = func._schema.name
    emulated = name in _PRODUCTS or name in _FUSED
    return name if emulated and func._overloadname in _OVERLOADS else None


def _is_composite(func: Any) -> bool:
    """Tells whether an operation is defined by other operations alone."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(func.has_kernel_for_dispatch_key(key))


def _half_type(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """Returns the 16-bit type to compute for, or None where PyTorch must decide by itself.

    Mixtures of types are PyTorch's to refuse; other devices and layouts are its to multiply.
    """
    dtypes = set()
    for value in (*args, *kwargs.values()):  # no product takes a list of tensors
        if isinstance(value, Tensor):
            if value.device.type != "cpu" or value.layout != torch.strided:
                return None
            if value.is_floating_point():
                dtypes.add(value.dtype)
        elif isinstance(value, torch.dtype):
            dtypes.add(value)
    if name in _FUSED:
        dtypes.discard(torch.float32)
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= _HALF_TYPES else None


def _compute_in_float32(
    func: Any, name: str, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs `func` on widened operands and rounds its 16-bit results once."""
    written = _written_argument(func)
    functional = getattr(torch.ops.aten, name.removeprefix("aten::").removesuffix("_")).default
    operands = {key: _widen(value) for key, value in kwargs.items() if key != written}
    result = functional(*map(_widen, args), **operands)
    result = _round_outputs(result, dtype, _FLOAT32_OUTPUTS.get(name, frozenset()))
    if written is None:
        return result
    if written in kwargs:
        return torch.ops.aten.clone.out(result, out=kwargs[written])
    return args[0].copy_(result)


@cache
def _written_argument(func: Any) -> str | None:
    """Returns the argument that an `out=` or in-place form writes, by name."""
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            return str(argument.name)
    return None


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _HALF_TYPES:
        return value.to(torch.float32)
    if isinstance(value, torch.dtype) and value in _HALF_TYPES:
        return torch.float32
    return value


def _round_outputs(result: Any, dtype: torch.dtype, kept: frozenset[int]) -> Any:
    """Rounds the FP32 tensors of a result to `dtype`, to nearest even, except those in `kept`."""

    def rounded(value: Any) -> Any:
        return value.to(dtype) if _is_float32(value) else value

    if not isinstance(result, tuple | list):
        return rounded(result)
    return tuple(value if index in kept else rounded(value) for index, value in enumerate(result))


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _check_float32_products() -> None:
    """Raises if this CPU's FP32 products round their operands; probes one, no setting is read.

    The setting has several names over PyTorch's releases, and no effect on most CPUs.
    """
    x = torch.full((64, 64), 1 + 2.0**-10, dtype=torch.float32, device="cpu")
    with torch.autocast("cpu", enabled=False):
        corner = (x @ x)[0, 0].item()
    if corner < 64 * (1 + 2.0**-10):
        raise StageError(
            "emulate_tensor_cores: expected FP32 matrix products that keep their operands, got "
            "products computed in BF16. Call torch.set_float32_matmul_precision('highest') first."
        )
