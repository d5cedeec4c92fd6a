"""Notices an optimizer whose parameters nobody trains any more."""

from __future__ import annotations

import warnings

#: Steps without any gradient, one after the other, until it is said.
MANY = 8


class IdleWatch:
    """Counts steps without any gradient, and warns once after many; no host sync."""

    def __init__(self) -> None:
        self._steps = 0
        self._told = False

    def see(self, *, any_gradient: bool, parameters: int) -> None:
        """Hears of a step.

        Args:
            any_gradient: Whether a parameter had a gradient.
            parameters: How many there are.
        """
        self._steps = 0 if any_gradient else self._steps + 1
        if self._steps < MANY or self._told or not parameters:
            return
        self._told = True
        warnings.warn(
            f"none of the {parameters} parameters of this optimizer has had a gradient in {MANY} "
            "steps. If the model trains, its parameters are others by now: fully_shard, an adapter "
            "that was loaded again, or a new head replaces them. Make the optimizer from "
            "model.parameters() after that, or put them into a param group. Nothing is wrong if "
            "it is meant to wait. This is said once.",
            stacklevel=5,
        )
