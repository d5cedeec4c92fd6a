"""Steps whose `optimizer.step` somebody has replaced, to see whether a GradScaler calls it.

That is how Accelerate and what is built on it learn of a skip. Optimizers that skip by themselves
(torch's fused ones, ours) are called in every iteration, so that nothing is seen of it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody other than torch's LR schedulers has replaced `step` of an optimizer.

    Only those matter that are called in every iteration.
    """
    step = getattr(optimizer, "__dict__", {}).get("step")
    if step is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    function = getattr(step, "__func__", step)
    if function is type(optimizer).step:  # was replaced, and was put back
        return False
    # Schedulers mark what they put there by an attribute, which functools.wraps copies on to what
    # others put around it. Where a function was written, nothing copies.
    written_in = getattr(function, "__globals__", {}).get("__name__")
    return written_in != torch.optim.lr_scheduler.__name__ and not _takes_scaler(step)


def step_watched(
    optimizer: Any, handed: tuple[Tensor | None, Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Steps by what is there in place of `step`; where that is a skip, by its class's own; syncs.

    That one skips by itself, and an optimizer of ours counts it.

    Args:
        optimizer: Its `step` was replaced.
        handed: `grad_scale`, what its gradients have to be divided by (None: nothing), and
            `found_inf`, 0-d, not 0 if the step is to be skipped.
        args: For its `step`.
        kwargs: Likewise.
    """
    skipped = bool(handed[1] != 0)
    optimizer.grad_scale, optimizer.found_inf = handed
    try:
        return type(optimizer).step(optimizer) if skipped else optimizer.step(*args, **kwargs)
    finally:
        for name in ("grad_scale", "found_inf"):  # a step that fails may have taken them away
            vars(optimizer).pop(name, None)


def _takes_scaler(step: Any) -> bool:
    """Whether it is one of the old kind, that torch hands itself to and that does everything."""
    return "grad_scaler" in inspect.signature(step).parameters
