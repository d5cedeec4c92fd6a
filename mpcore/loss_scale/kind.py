"""What a loss scale is: a frozen description, and the rule by which a state follows another.

What changes during training is a `LossScaleState`. `next_state` is the specification, in plain
Python; `LossScale.advance_` does the same to tensors of a device, without a host sync.

Scaling multiplies the loss so that small gradients survive in 16 bits (Micikevicius et al.,
"Mixed Precision Training", ICLR 2018, section 3.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from mpcore.errors import ArgumentTypeError
from mpcore.loss_scale.move import ScaleMove, update_scale_
from mpcore.loss_scale.state import LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors

#: `update_scale_` of a backend
Update = Callable[[ScaleMove, Tensor], None]


class LossScale(ABC):
    """How a loss scale begins and moves: Dynamic-, Headroom-, Static-, `NoLossScale`.

    Attributes:
        scales: Whether gradients are only right if their loss was scaled.
        moves: Whether steps change the scale.
        wants_largest: Whether it moves by the largest gradient of a step.
        at_min: What an overflow at the smallest scale does: "clamp", "warn" or "raise".
        growth_interval: Clean steps after which it tries a larger scale; None: it never does.

    Example:
        >>> from mpcore import DynamicLossScale, NoLossScale
        >>> [(kind.scales, kind.moves) for kind in (DynamicLossScale, NoLossScale)]
        [(True, True), (False, False)]
    """

    scales: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    wants_largest: ClassVar[bool] = False
    at_min: str = "clamp"
    growth_interval: int | None = None

    @abstractmethod
    def first(self) -> LossScaleState:
        """Returns the state before the first step."""

    @abstractmethod
    def resumed(self, saved: LossScaleState) -> LossScaleState:
        """Returns a saved state as this scale goes on from it."""

    @abstractmethod
    def after(self, state: LossScaleState, *, found_inf: bool, largest: float) -> LossScaleState:
        """Returns what follows a step that has been counted.

        Args:
            state: With the step, its skip and skips in a row counted.
            found_inf: Whether a gradient of the step was not finite.
            largest: Largest magnitude of unscaled float16 gradients, 0 if there are none.
        """

    def move(self, tensors: LossScaleTensors) -> ScaleMove | None:
        """Returns how the scale moves within an update; None: not there, but in `advance_`."""
        return None

    @abstractmethod
    def advance_(
        self,
        tensors: LossScaleTensors,
        found_inf: Tensor,
        update: Update = update_scale_,
        largest: Tensor | None = None,
    ) -> None:
        """Does to tensors what counting a step and `after` do to a state; no host sync.

        Args:
            tensors: The state.
            found_inf: 0-d; non-zero means overflow. int32 for a backend other than the reference.
            update: `update_scale_` of a backend.
            largest: 0-d float64, as for `after`; None: nobody looked.
        """


def check_loss_scale(loss_scale: object) -> LossScale:
    """Returns `loss_scale`; raises `ArgumentTypeError` if it is none."""
    if not isinstance(loss_scale, LossScale):
        raise ArgumentTypeError(
            "loss_scale: expected DynamicLossScale(...), HeadroomLossScale(...), "
            f"StaticLossScale(scale) or NoLossScale(), got {loss_scale!r}. For a fixed "
            "scale pass mpcore.StaticLossScale(1024.0)."
        )
    return loss_scale


def initial_state(loss_scale: LossScale) -> LossScaleState:
    """Returns the state before the first step."""
    return loss_scale.first()


def resumed_state(loss_scale: LossScale, saved: LossScaleState) -> LossScaleState:
    """Returns `saved` as `loss_scale` goes on from it: its own scale, or the saved one in bounds.

    The settings of a run may change between saving and loading, and they win.
    """
    return loss_scale.resumed(saved)


def next_state(
    loss_scale: LossScale, state: LossScaleState, *, found_inf: bool, largest: float = 0.0
) -> LossScaleState:
    """Returns the state after one step: the specification that every implementation follows.

    Args:
        loss_scale: The description; static ones never move.
        state: The state before the step.
        found_inf: Whether a gradient of the step was not finite.
        largest: Largest magnitude of unscaled float16 gradients, for a `HeadroomLossScale`.
    """
    counted = state._replace(
        steps=state.steps + 1,
        skipped_steps=state.skipped_steps + int(found_inf),
        skips_in_a_row=state.skips_in_a_row + 1 if found_inf else 0,
    )
    return loss_scale.after(counted, found_inf=found_inf, largest=largest)
