"""What tables report besides losses: lost updates and subnormal gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpcore.base import SIXTEEN_BIT
from mpcore.demo.regimes import Engine
from mpcore.monitoring.memory import accumulators


def count_lost(
    before: Tensor, after: Tensor, momentum: Tensor, weight_decay: float
) -> tuple[int, int]:
    """Counts the non-zero updates of one AdamW step, and those that rounding lost; syncs.

    An AdamW update is non-zero, in exact arithmetic, where the first moment is, or where there is
    a weight to decay. It is lost where the stored value stays what it was.

    Args:
        before: The accumulator before the step.
        after: The same after the step, same shape and dtype.
        momentum: The first moment after the step, same shape.
        weight_decay: The decay of the step.

    Returns:
        The number of lost updates and of non-zero ones.

    Example:
        >>> before = torch.tensor([1.0, 1.0, 0.0])
        >>> after = torch.tensor([1.0, 0.5, 0.0])
        >>> count_lost(before, after, torch.tensor([0.1, 0.1, 0.0]), weight_decay=0.0)
        (1, 2)
    """
    moved = momentum != 0
    if weight_decay:
        moved |= before != 0
    return int((moved & (before == after)).sum()), int(moved.sum())


class UpdateTally:
    """Steps an optimizer and adds up the updates that rounding lost. Syncs at every step.

    Args:
        engine: The optimizer.

    Example:
        >>> from mpcore.demo.regimes import PlainAdamW
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = PlainAdamW([weight], lr=1e-9, weight_decay=0.0)
        >>> tally = UpdateTally(optimizer)
        >>> weight.grad = torch.tensor([1.0, 0.0])
        >>> skipped = tally.step()
        >>> tally.fraction  # one non-zero update, too small for a float32 1.0
        1.0
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lost = 0
        self.updates = 0

    @property
    def fraction(self) -> float:
        """Lost updates over non-zero updates, so far; 0 if there was none."""
        return self.lost / self.updates if self.updates else 0.0

    @torch.no_grad()
    def step(self) -> bool:
        """Steps the optimizer and counts what became of its updates.

        Returns:
            Whether the step was skipped; then there is nothing to count.
        """
        before = [tensor.detach().clone() for _, tensor in accumulators(self._engine)]
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        if self._engine.skipped_steps > skipped_before:
            return True
        decays = [g["weight_decay"] for g in self._engine.param_groups for _ in g["params"]]
        now = accumulators(self._engine)
        for old, (parameter, new), decay in zip(before, now, decays, strict=True):
            momentum = self._engine.state[parameter].get("exp_avg")
            if momentum is not None:
                lost, updates = count_lost(old, new, momentum, decay)
                self.lost += lost
                self.updates += updates
        return False


class SubnormalTally:
    """Adds up 16-bit gradients that are subnormal, where digits are lost. Syncs at every step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
        >>> weight.grad = torch.tensor([1.0, 2.0**-15, 0.0, 1.0], dtype=torch.float16)
        >>> tally = SubnormalTally()
        >>> tally.count([weight])
        >>> tally.fraction
        0.25
    """

    def __init__(self) -> None:
        self.subnormal = 0
        self.values = 0

    @property
    def fraction(self) -> float | None:
        """Subnormal values over all values, zeros included; None if there was no 16-bit one."""
        return self.subnormal / self.values if self.values else None

    def count(self, params: Iterable[Tensor]) -> None:
        """Counts the gradients that are there."""
        for param in params:
            grad = param.grad
            if grad is not None and grad.dtype in SIXTEEN_BIT:
                size = grad.abs()
                small = (size > 0) & (size < torch.finfo(grad.dtype).tiny)
                self.subnormal += int(small.sum())
                self.values += size.numel()
