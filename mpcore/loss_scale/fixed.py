"""The loss scales that never move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpcore.base import check_scale
from mpcore.loss_scale.kind import LossScale, Update
from mpcore.loss_scale.move import count_step_, update_scale_
from mpcore.loss_scale.state import LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors


class _Fixed(LossScale):
    """A scale that stays: steps are counted, and that is all."""

    moves: ClassVar[bool] = False

    def resumed(self, saved: LossScaleState) -> LossScaleState:
        """Returns the own scale with the steps that were counted."""
        return self.first()._replace(
            steps=saved.steps,
            skipped_steps=saved.skipped_steps,
            skips_in_a_row=saved.skips_in_a_row,
        )

    def after(self, state: LossScaleState, *, found_inf: bool, largest: float) -> LossScaleState:
        """Returns `state`."""
        return state

    def advance_(
        self,
        tensors: LossScaleTensors,
        found_inf: Tensor,
        update: Update = update_scale_,
        largest: Tensor | None = None,
    ) -> None:
        """Counts the step; no host sync."""
        count_step_(tensors.counters, found_inf)


@dataclass(frozen=True)
class StaticLossScale(_Fixed):
    """A scale that never moves. Gradients are still checked, and a step that overflows skipped.

    Args:
        scale: A power of two inside [2^-126, 2^126].

    Raises:
        ArgumentError: `scale` is not such a power of two.

    Example:
        >>> from mpcore.loss_scale import initial_state
        >>> initial_state(StaticLossScale(1024)).scale
        1024.0
    """

    scale: float

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)

    def first(self) -> LossScaleState:
        """Returns the state before the first step."""
        return LossScaleState(float(self.scale), 0, 0, 0, 0)


@dataclass(frozen=True)
class NoLossScale(_Fixed):
    """No scaling: the loss is used as it is. Gradients are still checked, bad steps skipped.

    Right for bfloat16, whose exponent range is that of float32, and for float32.

    Example:
        >>> from mpcore.loss_scale import initial_state
        >>> initial_state(NoLossScale()).scale
        1.0
    """

    scales: ClassVar[bool] = False

    def first(self) -> LossScaleState:
        """Returns the state before the first step."""
        return LossScaleState(1.0, 0, 0, 0, 0)
