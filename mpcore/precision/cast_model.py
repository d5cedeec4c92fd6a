"""`cast_model`: 16-bit weights in a model that runs as before, FP32 originals for the optimizer.

Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.1 (FP32 master copy of
weights) and section 3.3 (normalisation and large reductions in FP32).
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from mpcore.base import SIXTEEN_BIT
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.errors import ArgumentError, ArgumentTypeError, StageError
from mpcore.precision import buffers
from mpcore.precision.casts import attach, hooks_of
from mpcore.precision.islands import Choices, Plan, make_plan
from mpcore.precision.parameters import (
    Casts,
    cast_parameters,
    check_ownership,
    replace_parameters,
    widen_tensors,
)
from mpcore.precision.rehearsal import rehearse
from mpcore.precision.report import CastReport, CastRow
from mpcore.precision.watch import Watch, watch_of

Model = TypeVar("Model", bound=nn.Module)


def cast_model(
    model: Model,
    dtype: torch.dtype,
    optimizer: MixedPrecisionOptimizer | None = None,
    *,
    keep_fp32: Choices | None = None,
    batch: Any = None,
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

    Of the buffers, single numbers, position codes and what the forward pass writes stay in FP32;
    the others are rounded, with a warning where that changes much. `print(cast_report(model))`
    shows all of it.

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
            that the loss is FP32; others hand on 16-bit values like their neighbours. Names of
            buffers, as in `model.named_buffers()`, keep these.
        batch: What the model is called with: a tensor, a tuple of positional or a dictionary of
            keyword arguments. Copies of the model run forward with it first: what they write, and
            what can stay in FP32 at no cost, stays. Without it, what is written shows in the first
            pass, and goes back to FP32 then.

    Returns:
        `model` itself.

    Raises:
        ArgumentTypeError: An argument has the wrong type; the optimizer is not wrapped.
        ArgumentError: A weight is not finite in `dtype`, a parameter is neither FP32 nor of
            `dtype`, the optimizer lacks a parameter, `keep_fp32` names nothing or splits tied
            weights; the model does not run on `batch`. Nothing has changed then.
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
    casts = cast_parameters(plan.halves, dtype, names)
    if optimizer is not None:
        check_ownership(casts, optimizer, names)
    choices: buffers.Choices = {}
    if model in plan.hooks and watch_of(model) is None:
        choices = _choose_buffers(model, plan, dtype, batch)
        watch = _watch(model, plan, dtype, casts, choices)
    else:
        watch = None  # all of it is kept, or it was cast before
    replace_parameters(casts, optimizer)
    _carry_out(model, plan, dtype, choices)
    if watch is not None:
        watch.attach(model)
    return model


def cast_report(model: nn.Module) -> CastReport:
    """Returns what `cast_model` did to a model, which prints as a table; no sync.

    It also has what the passes since then have shown: buffers that went back to FP32.

    Args:
        model: Was given to `cast_model`.

    Raises:
        ArgumentTypeError: It is not a module.
        ArgumentError: It was not cast, or all of it was kept in FP32.

    Example:
        >>> import torch, mpcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> model[0].register_buffer("steps", torch.zeros(()))
        >>> print(mpcore.cast_report(mpcore.cast_model(model, torch.float16)))
        | name | what | type | largest error | why |
        |---|---|---|---|---|
        | 2 parameters | weights | float16 | ... | 20 values |
        | 1 | module | float32 | 0 | a normalisation |
        | 0.steps | buffer | float32 | 0 | a single number |
    """
    check_model(model)
    watch = watch_of(model)
    if watch is None:
        raise ArgumentError(
            "model: expected one that was given to cast_model and has 16-bit modules, got one that "
            "carries no report of a cast. Cast it, or ask for that of the part that was cast."
        )
    return watch.report


def _choose_buffers(
    model: nn.Module, plan: Plan, dtype: torch.dtype, batch: Any
) -> buffers.Choices:
    """Returns what becomes of the buffers, and warns of those whose rounding is grave."""
    choices = buffers.choose_buffers(model, plan.halves, dtype, plan.named)
    if batch is not None:

        def cast(other: nn.Module, tried: buffers.Choices) -> None:
            again = make_plan(other, dtype, lambda name, _: name in plan.chosen)
            names = {param: name for name, param in other.named_parameters()}
            replace_parameters(cast_parameters(again.halves, dtype, names), None)
            _carry_out(other, again, dtype, tried)

        choices = rehearse(model, batch, choices, cast)
    said = buffers.warning_of(choices.values(), dtype)
    if said:
        warnings.warn(said, stacklevel=3)
    return choices


def _carry_out(model: nn.Module, plan: Plan, dtype: torch.dtype, choices: buffers.Choices) -> None:
    """Does all but the weights."""
    widen_tensors(plan.kept)
    buffers.settle_buffers(model, dtype, choices)
    for module, hooks in plan.hooks.items():
        attach(module, hooks)
    for module in plan.halves:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants the weights in one piece again


def _watch(
    model: nn.Module, plan: Plan, dtype: torch.dtype, casts: Casts, choices: buffers.Choices
) -> Watch:
    """Returns the watch of a model that is about to be cast, with the report of it."""
    errors = [float((p.detach() - c).abs().max()) for p, c in casts.items() if p.numel()]
    values = f"{sum(param.numel() for param in casts)} values"
    rows = [CastRow(f"{len(casts)} parameters", "weights", dtype, max(errors, default=0.0), values)]
    rows += [CastRow(n, "module", torch.float32, 0.0, why) for n, why in plan.reasons.items()]
    owners, originals = {}, {}
    for name, choice in choices.items():
        owner, leaf = buffers.owner_of(model, name)
        buffer = owner._buffers[leaf]
        if buffer is None:
            continue
        owners[name] = owner
        before = buffer.dtype if buffer.dtype not in SIXTEEN_BIT else torch.float32
        cast_to = buffer.dtype if buffer.dtype in SIXTEEN_BIT else dtype
        now = before if choice.kind is not None else cast_to
        rows.append(CastRow(name, "buffer", now, choice.error, choice.reason))
        if choice.error > 0:
            originals[name] = buffer.detach().clone()
    return Watch(CastReport(dtype, tuple(rows), plan.named), owners, originals)


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
    watch = watch_of(model)
    named_the_same = watch is None or watch.report.named == plan.named
    for name, module in model.named_modules():
        present = hooks_of(module)
        wanted = plan.hooks.get(module, (None, None))
        # the root of a part that was cast by itself may have one that the whole can do without
        extra = wanted == (None, None) and module in plan.halves
        given, taken = present
        is_extra = extra and taken is None and given is not None and given.dtype == dtype
        if named_the_same and (present in ((None, None), wanted) or is_extra):
            continue
        raise StageError(
            f"model: expected one that is not cast, or cast with the same choices, got {name!r} "
            "cast otherwise. Build the model anew and cast it once."
        )
