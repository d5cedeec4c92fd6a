"""Checks of optimizers, parameters and gradients; none of them changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpcore.base import (
    FULL_PRECISION,
    PLAIN,
    SIXTEEN_BIT,
    can_be_stepped,
    is_placed_otherwise,
    placed_like,
    why_no_memory,
)
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.masters.inner_guards import DirectStepGuard
from mpcore.masters.masters import Groups, Masters
from mpcore.masters.shared import conflicting
from mpcore.ranks import naming_failures
from mpcore.updates import parts_of


def name_of(param: Tensor, groups: Groups) -> str:
    """Returns the parameter's name, or "group 0, parameter 17, [768, 768]" if it has none."""
    for number, group in enumerate(groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is param:
                return _name(group, number, index)
    return f"a parameter of no group, {list(param.shape)}"


def names_of(groups: Groups) -> dict[int, str]:
    """Returns the names of all parameters, by `id`."""
    return {
        id(param): _name(group, number, index)
        for number, group in enumerate(groups)
        for index, param in enumerate(group["params"])
    }


def _name(group: dict[str, Any], number: int, index: int) -> str:
    if "param_names" in group:
        return str(group["param_names"][index])
    param = group["params"][index]
    shape = "nested" if param.is_nested else list(param.shape)
    return f"group {number}, parameter {index}, {shape}"


def check_inner(optimizer: object, wrapper: type) -> None:
    """Raises unless `optimizer` is one that `wrapper` can wrap."""
    if isinstance(optimizer, wrapper):
        raise ArgumentError("optimizer: expected an unwrapped optimizer, got one that is wrapped.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "Pass the object, e.g. torch.optim.AdamW(model.parameters(), lr=3e-4)."
        )
    parts = parts_of(optimizer)
    if any(isinstance(part, torch.optim.SparseAdam) for part in parts):
        raise ArgumentError(
            "optimizer: expected one for dense gradients, got SparseAdam. Use Adam or Adagrad, and "
            "torch.nn.Embedding(..., sparse=False)."
        )
    behind = [p for p in parts if type(p).__module__.startswith("torch.distributed.optim")]
    if behind:
        raise ArgumentError(
            "optimizer: expected one that steps the parameters it is given, got "
            f"{type(behind[0]).__name__}, which writes to them behind the masters. Pass the "
            "optimizer that it wraps, and ranks=mpcore.Ranks(); for shards of masters and moments "
            "use fully_shard() of torch.distributed.fsdp."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ArgumentError(
            "optimizer: expected differentiable=False, got True. Casts to 16 bits have no gradient."
        )
    check_params(optimizer.param_groups)
    hooks = [hook for part in parts for hook in part._optimizer_step_pre_hooks.values()]
    if any(isinstance(hook, DirectStepGuard) and hook.active for hook in hooks):
        raise ArgumentError(
            "optimizer: expected an unwrapped optimizer, got one that another "
            "MixedPrecisionOptimizer wraps. Use that one, or delete it first."
        )


def check_params(groups: Groups) -> None:
    """Raises unless every parameter is real, floating and in one place only."""
    seen: set[Tensor] = set()
    for group in groups:
        for param in group["params"]:
            if param.dtype not in (*SIXTEEN_BIT, *FULL_PRECISION):
                raise ArgumentError(
                    f"{name_of(param, groups)}: expected float16, bfloat16, float32 or float64, "
                    f"got {param.dtype}. Keep it out of this optimizer."
                )
            if not can_be_stepped(param):
                raise ArgumentError(
                    f"{name_of(param, groups)}: expected a dense tensor with values, but "
                    f"{why_no_memory(param)}. Make it one before the optimizer."
                )
            if param in seen:
                raise ArgumentError(
                    f"{name_of(param, groups)}: expected every parameter once, got it twice. "
                    "Tied weights belong into the optimizer once."
                )
            seen.add(param)


def check_group(
    param_group: dict[str, Any], present: list[Tensor]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Returns a checked copy of a new param group, and its parameters without their names."""
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise ArgumentTypeError('param_group: expected a dict with the key "params".')
    params = param_group["params"]
    if isinstance(params, set):
        raise ArgumentTypeError(
            "param_group: expected ordered parameters, got a set. Pass a list: the order of a set "
            "changes between runs."
        )
    entries = [params] if isinstance(params, Tensor) else list(params)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ArgumentTypeError("param_group: expected tensors, or (name, tensor) pairs.")
    check_params([{"params": present}, {"params": tensors}])
    return {**param_group, "params": entries}, tensors


def check_original(
    param: Tensor, original: Tensor, device_of: Mapping[Tensor, torch.device], masters: Masters
) -> None:
    """Raises unless `original` can become the master of `param`."""
    if param not in device_of:
        raise ArgumentError(
            f"adopt_masters: expected parameters of this optimizer, got {list(param.shape)}, "
            "which it does not hold."
        )
    if param.dtype not in SIXTEEN_BIT or original.dtype != torch.float32:
        raise ArgumentError(
            "adopt_masters: expected a 16-bit parameter and its float32 original, got "
            f"{param.dtype} and {original.dtype}."
        )
    if param.shape != original.shape or param.device != original.device:
        raise ArgumentError(
            f"adopt_masters: expected an original of shape {list(param.shape)} on {param.device}, "
            f"got {list(original.shape)} on {original.device}."
        )
    if masters.of(param) is not param:
        raise ArgumentError("adopt_masters: expected a parameter without a master, got one with.")


def check_shared(
    masters: Masters, values: Mapping[Tensor, Tensor], groups: Groups, *, loaded: bool
) -> None:
    """Raises if another optimizer was given other masters; syncs for parameters that it shares.

    Args:
        masters: Those that are going to be replaced.
        values: New masters, by parameter.
        groups: For names.
        loaded: Whether masters may be replaced that the other optimizer has not loaded.
    """
    differ = conflicting(masters.sharing, values, masters.value_of_others, loaded=loaded)
    if differ:
        raise ArgumentError(
            f"{name_of(differ[0], groups)}: expected the master that another optimizer of this "
            "parameter was given, got a different one. A shared parameter has one master: take "
            "both states from one moment, or delete the other optimizer."
        )


def check_can_be_stepped(
    param: Tensor,
    grad: Tensor,
    groups: Groups,
    device_of: Mapping[Tensor, torch.device],
    masters: Masters,
) -> None:
    """Raises unless a parameter can be stepped with its gradient, which may get memory of its own.

    Args:
        param: One that has a gradient.
        grad: That.
        groups: The optimizer's param groups.
        device_of: Where each parameter was when it came to the optimizer.
        masters: Where the masters are.
    """
    # a parameter that came through the inner optimizer is where it is
    device = device_of.get(param, param.device)
    if param.device != device:
        raise ArgumentError(
            f"{name_of(param, groups)}: expected it on {device}, where it was "
            f"when the optimizer was wrapped, got {param.device}. Move the model first, "
            "then make the optimizer."
        )
    if type(param) in PLAIN and (reason := why_no_memory(param)) is not None:
        raise ArgumentError(
            f"{name_of(param, groups)}: expected values in memory, got none: {reason}. Put them "
            "back before the optimizer is asked for anything."
        )
    if grad.layout != torch.strided:
        raise ArgumentError(
            f"{name_of(param, groups)}: expected a dense gradient, got {grad.layout}. "
            "Pass sparse=False to the embedding."
        )
    if grad.is_neg():
        param.grad = grad = grad.resolve_neg()
    if is_placed_otherwise(param, grad):
        with naming_failures(None, lambda: f"the sum of the gradients of {name_of(param, groups)}"):
            param.grad = grad = placed_like(param, grad)
    wrapped = why_no_memory(param) is not None
    if not can_be_stepped(grad) or wrapped != (why_no_memory(grad) is not None):
        raise ArgumentError(
            f"{name_of(param, groups)}: expected a gradient of its own kind, "
            f"{type(param.detach()).__name__}, got a {type(grad).__name__}: "
            f"{why_no_memory(grad) or 'it is an ordinary tensor'}. Give it one, or None."
        )
    if param.dtype not in SIXTEEN_BIT and masters.of(param) is not param:
        raise ArgumentError(
            f"{name_of(param, groups)}: expected the 16-bit dtype that its master was made "
            f"for, got {param.dtype}. Cast before training, or wrap a new optimizer."
        )
