"""The parameters of a model that is cast: checked, rounded, put in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mpcore.base import SIXTEEN_BIT, any_dtensor
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.errors import ArgumentError

Casts = dict[nn.Parameter, Tensor]


def own_tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Returns the tensors that the modules own, parameters and buffers, each once."""
    owned = (
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return list(dict.fromkeys(owned))


def cast_parameters(
    halves: Iterable[nn.Module], dtype: torch.dtype, names: dict[nn.Parameter, str]
) -> Casts:
    """Returns the 16-bit weight of each FP32 parameter, or raises if one cannot be had."""
    casts: Casts = {}
    for param in own_tensors_of(halves):
        if not isinstance(param, nn.Parameter) or not param.is_floating_point():
            continue
        _check_castable(param, dtype, names[param])
        if param.dtype == torch.float32:
            casts[param] = param.detach().to(dtype)
            _check_finite(param, casts[param], names[param])
    return casts


def _check_castable(param: nn.Parameter, dtype: torch.dtype, name: str) -> None:
    if nn.parameter.is_lazy(param) or param.is_meta:
        raise ArgumentError(
            f"model: expected initialised parameters, got {name!r} without values. Run one "
            "forward pass, or materialise the model, before casting it."
        )
    if param.dtype not in (torch.float32, dtype):
        raise ArgumentError(
            f"model: expected parameters of torch.float32 or {dtype}, got {name!r} of "
            f"{param.dtype}. Start from FP32 weights: model.float()."
        )


def _check_finite(original: Tensor, cast: Tensor, name: str) -> None:
    if not bool(cast.isfinite().all()):
        raise ArgumentError(
            f"model: expected weights that {cast.dtype} can represent, got {name!r} with a "
            f"largest magnitude of {original.detach().abs().max().item():g}. Rescale it, keep its "
            "module in FP32 (keep_fp32), or cast to torch.bfloat16."
        )


def check_ownership(
    casts: Casts, optimizer: MixedPrecisionOptimizer, names: dict[nn.Parameter, str]
) -> None:
    """Raises unless an optimizer has every trainable parameter that is cast."""
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    for param in casts:
        if param.requires_grad and param not in owned:
            raise ArgumentError(
                f"optimizer: expected one that holds every trainable parameter, got one without "
                f"{names[param]!r}. Build it from model.parameters(), or freeze the parameter."
            )


def replace_parameters(casts: Casts, optimizer: MixedPrecisionOptimizer | None) -> None:
    """Puts the 16-bit weights into the parameters, and the originals into the optimizer."""
    # `data`, not `detach()`: a master must not share its weight's version counter
    originals = {param: param.data for param in casts}
    for param, cast in casts.items():
        _put(param, cast)
    if optimizer is None:
        return
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    try:
        optimizer.adopt_masters([(p, original) for p, original in originals.items() if p in owned])
    except BaseException:
        for param, original in originals.items():
            _put(param, original)
        raise


def widen_tensors(modules: Iterable[nn.Module]) -> None:
    """Makes the 16-bit parameters and buffers of modules that stay in FP32 FP32 again."""
    widened = [(t, t.float()) for t in own_tensors_of(modules) if t.dtype in SIXTEEN_BIT]
    for tensor, wide in widened:
        _put(tensor, wide)


def _put(tensor: Tensor, value: Tensor) -> None:
    """Makes a value what a tensor holds; that stays the same object."""
    if not any_dtensor([tensor]):
        tensor.data = value
        return
    # `.data` would leave what this rank holds of a DTensor as it is
    other = nn.Parameter(value, requires_grad=tensor.requires_grad)
    other.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]
