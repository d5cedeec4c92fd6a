"""One step of training in each of the ways in which the public interface can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mpcore
import torch
from torch import Tensor

from mpcore_testing.golden.plans import Pass, Step

if TYPE_CHECKING:
    from mpcore_testing.golden.training import Training


def usual(training: Training, step: Step) -> Tensor | None:
    """backward, perhaps accumulate, perhaps clip, step."""
    optimizer = training.optimizer
    optimizer.zero_grad()
    for number, one in enumerate(step.passes):
        optimizer.backward(training.loss(one, number))
        if len(step.passes) > 1:
            optimizer.accumulate()
            training.pause()
            optimizer = training.optimizer
    norm = None if step.clip is None else optimizer.clip_grad_norm_(step.clip)
    optimizer.step()
    return norm


def unscaled_first(training: Training, step: Step) -> Tensor | None:
    """`unscale_`, one gradient edited by hand, the clip, and only then the step."""
    optimizer = training.optimizer
    optimizer.zero_grad()
    for number, one in enumerate(step.passes):
        optimizer.backward(training.loss(one, number))
        if len(step.passes) > 1:
            optimizer.accumulate()
    optimizer.unscale_()
    optimizer.grads()[0].mul_(0.5)
    norm = None if step.clip is None else optimizer.clip_grad_norm_(step.clip)
    optimizer.step()
    return norm


def with_closure(training: Training, step: Step) -> None:
    """`step` evaluates a closure, which clears gradients and runs the first pass."""
    optimizer = training.optimizer

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training.loss(step.passes[0], 0)
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)


def several_losses(training: Training, step: Step) -> Tensor | None:
    """The optimizer's own loss and two more; the overflows of a plan come from each in turn."""
    optimizer = training.optimizer
    optimizer.zero_grad()
    losses = optimizer.losses
    own, *others = (optimizer, losses["penalty"], losses["fixed"])
    for number, one in enumerate(step.passes):
        own.backward(training.loss(one, number))
    calm = Pass(short=step.passes[0].short, factor=0.5)
    wild = Pass(short=calm.short, bad=float("inf"))
    for number, loss in enumerate(others, start=3):
        overflows = loss is losses["penalty"] and training.number in (1, 4)
        loss.backward(training.loss(wild if overflows else calm, number))
    norm = None if step.clip is None else optimizer.clip_grad_norm_(step.clip)
    optimizer.step()
    return norm


def driven_by_scaler(training: Training, step: Step) -> None:
    """A loop that a GradScaler drives."""
    optimizer, scaler = training.optimizer, training.scaler
    optimizer.zero_grad()
    scaler.scale(training.loss(step.passes[0], 0)).backward()
    scaler.step(optimizer)
    scaler.update()


def nothing_more(training: Training) -> None:
    """What most loops need besides the optimizer."""


def add_losses(training: Training) -> None:
    """Two losses with scales of their own."""
    dynamic = mpcore.DynamicLossScale(init=2.0**6, growth_interval=2)
    training.optimizer.add_loss("penalty", dynamic)
    training.optimizer.add_loss("fixed", mpcore.StaticLossScale(2.0**3))


def add_torch_scaler(training: Training) -> None:
    """torch's own."""
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)


def add_own_scaler(training: Training) -> None:
    """Ours, with a hysteresis."""
    training.scaler = mpcore.GradScaler(
        "cpu", init_scale=2.0**8, growth_interval=2, hysteresis=2, min_scale=2.0
    )
