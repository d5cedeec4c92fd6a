"""LR schedulers that count updates, and steps that are no updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mpcore.base import outside_graphs
from mpcore.engine.drivers import unwrapped


class _Scheduler(Protocol):
    # a method of any arguments: those of torch's schedulers differ from class to class
    @property
    def step(self) -> Callable[..., object]: ...


class _Step(Protocol):
    @property
    def skipped(self) -> bool: ...


@outside_graphs
def step_scheduler(
    scheduler: _Scheduler, last_step: _Step | torch.optim.Optimizer | None, *metrics: float
) -> bool:
    """Steps an LR scheduler unless the optimizer's last step was skipped; syncs with the host.

    A schedule that counts updates would run ahead with every skipped step. One that counts batches
    should: call its `step` yourself, which syncs with nothing.

    Args:
        scheduler: Any of `torch.optim.lr_scheduler`, or what has such a `step`.
        last_step: `optimizer.last_step`, or that of a `mpcore.GradScaler`. None, as it is before
            the first step and after one without gradients, counts as skipped. Or the optimizer
            itself, also one that a trainer has wrapped.
        metrics: What `ReduceLROnPlateau.step` takes.

    Returns:
        Whether the scheduler was stepped.

    Example:
        >>> import torch, mpcore
        >>> weight = torch.nn.Parameter(torch.ones(2).half())
        >>> optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=1.0))
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        >>> for size in (torch.inf, 1.0):
        ...     optimizer.backward((weight.float() * size).sum())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     mpcore.step_scheduler(scheduler, optimizer.last_step)
        False
        True
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    if isinstance(last_step, torch.optim.Optimizer):
        last_step = unwrapped(last_step).last_step
    if last_step is None or last_step.skipped:
        return False
    scheduler.step(*metrics)
    return True
