"""Who hears of each step: what a monitor offers to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from mpcore.engine.gradients import StepGradients
from mpcore.engine.step_result import StepResult


class Watcher(Protocol):
    """Somebody who wants to know what happens in each step: `mpcore.Monitor`."""

    @property
    def has_losses(self) -> bool:
        """Whether it has heard of a loss since the last step."""

    def see_loss(self, outputs: Any, name: str = "") -> None:
        """Hears what is going to be scaled, and the name of the loss."""

    def see_pass(self, params: Sequence[Tensor], scale: Tensor, name: str) -> None:
        """Hears whose gradients are going to be added to sums, their scale, and their loss."""

    def begin_step(self, params: Sequence[Tensor]) -> bool:
        """Hears whose gradients are collected; returns whether their values shall be counted."""

    def end_step(self, gradients: StepGradients, result: StepResult, *, own_scale: bool) -> None:
        """Hears how the step ended, after the scale has moved, and whether that is our own."""

    def forget(self, *, last_step: bool) -> None:
        """Hears that passes were thrown away, and whether the last step is none any more."""

    def note_loaded(self) -> None:
        """Hears that the optimizer's state is another one from now on, that of a checkpoint."""
