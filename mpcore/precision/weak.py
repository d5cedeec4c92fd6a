"""FP32 tensors that give way to 16-bit ones, as which a 16-bit model sees its FP32 buffers.

torch refuses an FP32 operand beside 16-bit ones in a product, in `lerp_` and in `index_add_`; and
whatever is elementwise it makes FP32, so that the next product refuses that. Here the types meet
before torch sees them.

Source: JAX's weakly typed values, whose type gives way to that of the arrays they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from mpcore.base import FULL_PRECISION, SIXTEEN_BIT

#: Matrix products and convolutions: what a running value meets there are activations.
_PRODUCTS = frozenset(
    ["matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "vdot", "inner"]
    + ["addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot", "chain_matmul", "multi_dot"]
    + ["linear", "bilinear", "scaled_dot_product_attention"]
    + [f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)]
)
#: Have no 16-bit kernel, or compare with values of which each digit counts.
_FULL = frozenset({"cdist", "bucketize", "searchsorted"})
#: Write statistics that are not their first argument: computed in FP32, like layers that do so.
_STATISTICS = frozenset({"batch_norm", "instance_norm", "fused_moving_avg_obs_fake_quant"})
_CONVERSIONS = frozenset({"to", "type", "type_as", "half", "bfloat16"})
_AUGMENTED = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
)
#: What reads those attributes that are a tensor's own values.
_VALUES = tuple(getattr(Tensor, name).__get__ for name in ("data", "T", "mT"))


def bounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `tensor` with finite values beyond the range of `dtype` at its ends; no sync.

    Example:
        >>> bounded(torch.tensor([-1e9, -torch.inf, 1.0]), torch.float16).tolist()
        [-65504.0, -inf, 1.0]
    """
    limits = torch.finfo(dtype)
    return torch.where(tensor.isinf(), tensor, tensor.clamp(limits.min, limits.max))


class WeakTensor(Tensor):
    """A constant in FP32 (or FP64) that is rounded only where it meets 16-bit tensors.

    Alone, with numbers, integers and FP32 it computes in FP32, and what comes of that is weak
    again unless it carries gradients. Beside a 16-bit tensor it is first rounded to that type, as
    if it had been cast from the start: the same bits, and no activation becomes FP32. What is
    written into it is widened. Finite values beyond the range become the largest finite one.

    Example:
        >>> table = torch.tensor([0.1, 2049.0]).as_subclass(WeakTensor)
        >>> (table * 2).tolist()[1], table.dtype
        (4098.0, torch.float32)
        >>> (table * torch.ones(2, dtype=torch.float16)).tolist()[1]
        2048.0
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs `func` on operands whose types agree."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            weak: list[WeakTensor] = []
            halves: list[Tensor] = []
            for tensor in _tensors((args, tuple(kwargs.values()))):
                if isinstance(tensor, WeakTensor):
                    weak.append(tensor)
                elif tensor.dtype in SIXTEEN_BIT:
                    halves.append(tensor)
            name = getattr(func, "__name__", "")
            if name == "__get__":  # reads an attribute
                result = func(*args)
                return _weak_again(result, cls) if func in _VALUES else result
            if isinstance(func, OpOverload | OpOverloadPacket):
                result = func(*args, **kwargs)  # who knows what somebody's operation writes to
            elif name in _CONVERSIONS and isinstance(args[0], WeakTensor):
                result = _convert(func, args, kwargs)
            elif halves and name in _STATISTICS:
                args, kwargs = _widened((args, kwargs))
                result = func(*args, **kwargs).to(halves[0].dtype)
            else:
                if halves and _rounds(name, args, kwargs, weak, halves):
                    args, kwargs = _narrowed((args, kwargs), halves[0].dtype)
                elif halves:
                    args, kwargs = _widened((args, kwargs))
                result = func(*args, **kwargs)
            return _weak_again(result, _kind(weak))

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakTensor:
        # of one that a module has kept in an attribute
        copy = plain(self).detach().clone().as_subclass(type(self))
        memo[id(self)] = copy
        return copy


class RunningTensor(WeakTensor):
    """A weak tensor that the model itself writes: averages, counters, codebooks.

    Beside 16-bit tensors that have no more elements and dimensions (statistics, of which its next
    value is made) it stays FP32 and they are widened; beside larger ones (activations) and in
    matrix products it is rounded.

    Example:
        >>> mean = torch.ones(2).as_subclass(RunningTensor)
        >>> x = torch.ones(8, 2, dtype=torch.bfloat16)
        >>> (x - mean).dtype, (0.999 * mean + 0.001 * x.mean(0)).dtype
        (torch.bfloat16, torch.float32)
    """


def plain(tensor: Tensor) -> Tensor:
    """Returns a tensor, weak or not, as torch's own kind; no sync.

    Example:
        >>> type(plain(torch.ones(2).as_subclass(WeakTensor))).__name__
        'Tensor'
    """
    if not isinstance(tensor, WeakTensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _kind(weak: list[WeakTensor]) -> type[WeakTensor]:
    return RunningTensor if any(isinstance(each, RunningTensor) for each in weak) else WeakTensor


def _rounds(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weak: list[WeakTensor],
    halves: list[Tensor],
) -> bool:
    """Tells whether the weak operands give way; else the 16-bit ones are widened."""
    if _is_weak(kwargs.get("out")):
        return False
    if _writes(name) and args and _is_weak(args[0]):
        return False
    if name in _FULL:
        return False
    if _kind(weak) is WeakTensor or name in _PRODUCTS:
        return True
    dims, elements = max(each.dim() for each in weak), max(each.numel() for each in weak)
    return any(each.dim() > dims or each.numel() > elements for each in halves)


def _is_weak(value: Any) -> bool:
    """Tells whether a tensor, or the first of a list, is weak."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return isinstance(value, WeakTensor)


def _writes(name: str) -> bool:
    """Tells whether a function of torch writes to its first argument, by torch's way of naming."""
    return name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))


def _convert(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Converts a weak tensor to a type that was asked for, within the range of that type."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and result.dtype in SIXTEEN_BIT:
        return func(bounded(args[0], result.dtype), *args[1:], **kwargs)
    return result


def _narrowed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, WeakTensor):
        return bounded(value, dtype).to(dtype)
    return _each(value, lambda item: _narrowed(item, dtype))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in SIXTEEN_BIT else value
    return _each(value, _widened)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a tuple, list or dictionary of arguments with each changed; others as they are."""
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)([change(item) for item in value])
    return value


def _weak_again(value: Any, kind: type[WeakTensor]) -> Any:
    if isinstance(value, Tensor):
        is_plain = type(value) is Tensor and value.dtype in FULL_PRECISION
        return value.as_subclass(kind) if is_plain and not value.requires_grad else value
    if isinstance(value, tuple | list):
        items = [_weak_again(item, kind) for item in value]
        # torch's named results take one sequence, other named tuples each item
        return type(value)(*items) if hasattr(value, "_make") else type(value)(items)
    return value
