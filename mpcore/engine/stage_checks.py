"""What must hold at each stage of a step, and what a call out of turn is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from mpcore.base import SIXTEEN_BIT
from mpcore.engine.external import External
from mpcore.engine.gradients import StepGradients
from mpcore.errors import StageError
from mpcore.masters import Groups, Masters, name_of


def raise_torn(caller: str) -> NoReturn:
    """Raises: an exception has left half of some gradients."""
    raise StageError(
        f"{caller}: expected whole gradients, got some that an exception left half "
        "unscaled. Call zero_grad() of this optimizer and run the backward passes again."
    )


def any_gradient(groups: Groups) -> bool:
    """Whether a parameter has a gradient."""
    return any(param.grad is not None for group in groups for param in group["params"])


def are_dropped(gradients: StepGradients | None) -> bool:
    """Whether somebody else has thrown away all gradients that were collected."""
    if gradients is None:
        return False
    if gradients.exposure is not None:
        return gradients.exposure.is_dropped
    # p.grad of what was added up is None anyway
    return gradients.accumulated is None and all(p.grad is None for p in gradients.params)


def still_there(
    params: Sequence[Tensor], gradients: StepGradients, masters: Masters
) -> Sequence[Tensor]:
    """Returns those of `params`, which have a gradient in `p.grad`, that are stepped with."""
    if gradients.accumulated is None or gradients.exposure is not None:
        return params
    # p.grad of 16-bit parameters is None by now
    return [param for param in gradients.params if masters.of(param).grad is not None]


def check_none_collected(caller: str, gradients: StepGradients | None) -> None:
    """Raises if gradients of this step were collected already."""
    if gradients is not None:
        raise StageError(
            f"{caller}: expected to be called before unscale_() or clip_grad_norm_() of the same "
            "step, got a call after. Run all backward passes first; or end that step, by step() or "
            "zero_grad() of its optimizer, clear all gradients, and run this pass again."
        )


def check_not_unscaled(caller: str, gradients: StepGradients | None) -> None:
    """Raises if gradients of this step are unscaled already."""
    if gradients is not None and gradients.exposure is not None:
        raise StageError(
            f"{caller}: expected one call per step, got a second one. Call step() first, or "
            "zero_grad() of this optimizer."
        )


def check_no_outside_scaler(caller: str, external: External | None) -> None:
    """Raises if an outside scaler drives a step whose gradients `accumulate` has unscaled."""
    if external is not None:
        raise StageError(
            f"{caller}: expected gradients that the GradScaler scaled, got some that accumulate() "
            "has unscaled. Call zero_grad() of this optimizer; then leave out accumulate(), or the "
            "GradScaler: optimizer.backward(loss), accumulate() and step(), with a loss scale of "
            "the optimizer's own."
        )


def check_no_newcomer(
    caller: str, params: Sequence[Tensor], gradients: StepGradients, groups: Groups
) -> None:
    """Raises if a parameter has a gradient that was not there when they were collected."""
    known = set(map(id, gradients.params))
    summed = gradients.accumulated is not None and gradients.exposure is None
    if not summed and known.issuperset(map(id, params)):
        return
    for param in params:
        if id(param) not in known or (summed and param.dtype in SIXTEEN_BIT):
            raise StageError(
                f"{caller}: expected the gradients that unscale_() or clip_grad_norm_() saw, "
                f"got a new one of {name_of(param, groups)}. Call zero_grad() of this optimizer, "
                "and run all backward passes first."
            )


def check_scaled(
    caller: str, external: External | None, any_gradient: bool, scaled: bool, twice: bool
) -> None:
    """Raises unless exactly one scaler has scaled the loss, for scales that are needed.

    Args:
        caller: The method that asks, for messages.
        external: The outside scaler that drives this step, if one does.
        any_gradient: Whether there is one.
        scaled: Whether this optimizer has scaled a loss since the last step.
        twice: Whether gradients of that loss may be those that an outside scaler steps.
    """
    if external is not None and twice:
        raise StageError(
            f"{caller}: expected one scaler, got two: the loss went through this optimizer's "
            "scale() and a GradScaler steps it. Use one of them, after zero_grad() of this "
            "optimizer: scaler.scale(loss).backward() and scaler.step(optimizer), or "
            "optimizer.backward(loss) and optimizer.step()."
        )
    if external is None and any_gradient and not scaled:
        raise StageError(
            f"{caller}: expected gradients of a scaled loss, got no scale() since the last "
            "step. Clear the gradients and call optimizer.backward(loss) instead of "
            "loss.backward(). Where a trainer runs the backward pass, or several optimizers step "
            "one loss, make an mpcore.GradScaler the scaler: scaler.scale(loss).backward(), "
            "scaler.unscale_(optimizer) before a clip, scaler.step(optimizer), scaler.update(). "
            "bfloat16 needs no scale: loss_scale=mpcore.NoLossScale()."
        )
