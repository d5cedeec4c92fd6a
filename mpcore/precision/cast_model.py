"""`cast_model`: 16-bit weights in a model that runs as before, FP32 originals for the optimizer.

Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.1 (FP32 master copy of
weights) and section 3.3 (normalisation and large reductions in FP32).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from mpcore.base import SIXTEEN_BIT
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
from mpcore.precision.casts import CastInputs, attach, hooks_of
from mpcore.precision.islands import Choices, Plan, make_plan

Model = TypeVar("Model", bound=nn.Module)


def cast_model(
    model: Model,
    dtype: torch.dtype,
    optimizer: MixedPrecisionOptimizer | None = None,
    *,
    keep_fp32: Choices | None = None,
) -> Model:
    """Casts a model's weights to 16 bits in place and keeps it running; syncs with the host.

    The `Parameter` objects stay the same, so an optimizer that was built before keeps working.
    Normalisation layers, embeddings with `max_norm` (which write to their weight in each forward
    pass), and what `keep_fp32` names, stay in FP32: they get FP32 inputs and hand on 16-bit
    outputs. Modules with 16-bit weights get 16-bit inputs. `state_dict` keys do not change. The
    model's result is as its last module leaves it: FP32 if that one is kept (see `keep_fp32`),
    16-bit if not.

    Call it before training, before `DistributedDataParallel` or `fully_shard`, and again on a
    model that is already cast only with the same choices, which changes nothing.

    Args:
        model: Any module. FP32 parameters are cast, and floating buffers too (finite values beyond
            the range become the largest finite one, so that a mask of -1e9 stays a mask). Weights
            that have the type already are left, complex and integer tensors as well.
        dtype: `torch.float16` or `torch.bfloat16`.
        optimizer: Takes the FP32 originals as masters, without a copy. Without it they are
            dropped, and masters made later start from the rounded weights.
        keep_fp32: Modules to keep in FP32 with all that is inside them: names as in
            `model.named_modules()` with `fnmatch` wildcards, modules, module classes, or a
            function of (name, module); one or a list. `["lm_head"]` keeps an output layer. A
            module named here after which the model registers no 16-bit weights returns FP32, so
            that the loss is FP32; others hand on 16-bit values like their neighbours.

    Returns:
        `model` itself.

    Raises:
        ArgumentTypeError: An argument has the wrong type; the optimizer is not wrapped.
        ArgumentError: A weight is not finite in `dtype`, a parameter is neither FP32 nor of
            `dtype`, the optimizer lacks a parameter, `keep_fp32` names nothing or splits tied
            weights. Nothing has changed then.
        StageError: A parameter has a gradient already, the model was cast with other choices, or
            it sits in `DistributedDataParallel`.

    Example:
        >>> import torch, mpcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = mpcore.MixedPrecisionOptimizer(inner)
        >>> model = mpcore.cast_model(model, torch.float16, optimizer)
        >>> [p.dtype for p in model.parameters()]
        [torch.float16, torch.float16, torch.float32, torch.float32]
        >>> model(torch.ones(2, 4)).dtype
        torch.float16
        >>> optimizer.state[model[0].weight]["master"].dtype
        torch.float32
    """
    check_model(model)
    _check_dtype(dtype)
    check_optimizer(optimizer)
    _check_stage(model)
    plan = make_plan(model, dtype, keep_fp32)
    _check_hooks(model, dtype, plan)
    names = {param: name for name, param in model.named_parameters()}
    casts = _cast_parameters(plan, dtype, names)
    if optimizer is not None:
        _check_ownership(casts, optimizer, names)
    widened = [(t, t.float()) for t in _tensors(plan.kept) if t.dtype in SIXTEEN_BIT]
    _replace_parameters(casts, optimizer)
    for tensor, wide in widened:
        tensor.data = wide
    _cast_buffers(plan, dtype)
    for module, hooks in plan.hooks.items():
        attach(module, hooks)
    for module in plan.halves:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants the weights in one piece again
    return model


def check_model(model: object) -> None:
    """Raises unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")


def check_optimizer(optimizer: object) -> None:
    """Raises unless `optimizer` can hold masters, or is None."""
    if optimizer is not None and not isinstance(optimizer, MixedPrecisionOptimizer):
        raise ArgumentTypeError(
            f"optimizer: expected a MixedPrecisionOptimizer, got {type(optimizer).__name__}. "
            "Wrap it first: mpcore.MixedPrecisionOptimizer(optimizer)."
        )


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}.")
    if dtype not in SIXTEEN_BIT:
        raise ArgumentError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}.")


def _check_stage(model: nn.Module) -> None:
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise StageError(
            "model: expected one that is not wrapped yet, got DistributedDataParallel, whose "
            "buckets have the old types. Cast the model, then wrap it."
        )
    for name, param in model.named_parameters():
        if param.grad is not None:
            raise StageError(
                f"model: expected parameters without gradients, got one in {name!r}. Cast before "
                "training begins, or set the gradients to None."
            )


def _check_hooks(model: nn.Module, dtype: torch.dtype, plan: Plan) -> None:
    """Raises if an earlier cast of the model, or of a part of it, made other choices."""
    for name, module in model.named_modules():
        present = hooks_of(module)
        wanted = plan.hooks.get(module, (None, None))
        # the root of a part that was cast by itself may have one that the whole can do without
        extra = wanted == (None, None) and module in plan.halves
        if present in ((None, None), wanted) or (extra and present == (CastInputs(dtype), None)):
            continue
        raise StageError(
            f"model: expected one that is not cast, or cast with the same choices, got {name!r} "
            "cast otherwise. Build the model anew and cast it once."
        )


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Returns the tensors that the modules own, parameters and buffers, each once."""
    owned = (
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return list(dict.fromkeys(owned))


def _cast_parameters(
    plan: Plan, dtype: torch.dtype, names: dict[nn.Parameter, str]
) -> dict[nn.Parameter, Tensor]:
    """Returns the 16-bit weight of each FP32 parameter, or raises if one cannot be had."""
    casts = {}
    for param in _tensors(plan.halves):
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


def _check_ownership(
    casts: dict[nn.Parameter, Tensor],
    optimizer: MixedPrecisionOptimizer,
    names: dict[nn.Parameter, str],
) -> None:
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    for param in casts:
        if param.requires_grad and param not in owned:
            raise ArgumentError(
                f"optimizer: expected one that holds every trainable parameter, got one without "
                f"{names[param]!r}. Build it from model.parameters(), or freeze the parameter."
            )


def _replace_parameters(
    casts: dict[nn.Parameter, Tensor], optimizer: MixedPrecisionOptimizer | None
) -> None:
    """Puts the 16-bit weights into the parameters, and the originals into the optimizer."""
    # `data`, not `detach()`: a master must not share its weight's version counter
    originals = {param: param.data for param in casts}
    for param, cast in casts.items():
        param.data = cast
    if optimizer is None:
        return
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    try:
        optimizer.adopt_masters([(p, original) for p, original in originals.items() if p in owned])
    except BaseException:
        for param, original in originals.items():
            param.data = original
        raise


def _cast_buffers(plan: Plan, dtype: torch.dtype) -> None:
    """Rounds the floating buffers of 16-bit modules, in place so that shared ones stay shared."""
    limits = torch.finfo(dtype)
    for buffer in _tensors(plan.halves):
        if isinstance(buffer, nn.Parameter) or buffer.dtype not in (torch.float32, torch.float64):
            continue
        bounded = buffer.clamp(limits.min, limits.max)
        buffer.data = torch.where(buffer.isinf(), buffer, bounded).to(dtype)
