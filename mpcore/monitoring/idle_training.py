"""Notices training that goes nowhere, in readings: only zeros, updates all lost, only skips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mpcore.monitoring.facts import Past
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.verdicts import scale_text

#: Steps in a row without a gradient that is not 0; and from the first to the last of some readings
#: in which no master has moved.
STEPS = 32
#: Readings in which no master has moved.
READINGS = 3
#: Steps in a row that an outside scaler has skipped; of the optimizer's own, `SkipAlarm` tells.
SKIPS = 100
#: Of gradients that are mostly 0, as those of an embedding, a sample of masters says nothing.
_MOST_ZEROS = 0.5


class IdleTraining:
    """Judges the steps before a reading by what was read anyway.

    Example:
        >>> idle = IdleTraining()
    """

    def __init__(self) -> None:
        self._still: list[int] = []  # readings in a row in which no usual master has moved

    def restart(self) -> None:
        """Forgets readings: a checkpoint was loaded."""
        self._still = []

    def look(
        self,
        reading: Reading,
        past: Sequence[Past],
        groups: Sequence[Mapping[str, Any]],
        *,
        moved: bool | None,
        own_scale: bool,
    ) -> dict[str, str | None]:
        """Returns by kind what to say at a reading, None for nothing; no host sync.

        Args:
            reading: Of the last step.
            past: The last steps, that one included.
            groups: The param groups, for their learning rates.
            moved: Whether a usual master has, see `Moves.usual`; None: nobody knows.
            own_scale: Whether the optimizer's own loss scale was used.
        """
        given = [group.get("lr", 0.0) for group in groups]
        there = [isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in given]
        rates = [] if any(there) else list(map(float, given))  # of a device nobody asks
        return {
            "zeros": _all_zero(past[-STEPS:]),
            "skips": None if own_scale else _only_skips(past[-SKIPS:]),
            "lost": self._all_lost(reading, moved, max(rates, key=abs, default=0.0)),
        }

    def _all_lost(self, reading: Reading, moved: bool | None, rate: float) -> str | None:
        if reading.skipped:
            return None
        small = reading.zeros is not None and reading.zeros <= _MOST_ZEROS
        if moved is not False or not rate or not reading.grad_norm or not small:
            self._still = []
            return None
        self._still.append(reading.step)
        first = self._still[0]
        if len(self._still) < READINGS or reading.step - first < STEPS:
            return None
        return (
            f"no weight moves: in each of {len(self._still)} readings from step {first} to "
            f"{reading.step} no FP32 master of the sample changed but for those near 0, although "
            f"the largest learning rate is {rate:.3g} and the norm of the gradients "
            f"{reading.grad_norm:.3g}. An update below 2^-25 of a weight is rounded away: raise "
            "the learning rate, or look whether it is divided twice."
        )


def _all_zero(past: Sequence[Past]) -> str | None:
    """Returns what to say if each step had gradients that were all 0, of a loss that is not."""
    losses = [one.loss for one in past]
    known = [abs(loss) for loss in losses if loss is not None and loss != 0]
    if len(past) < STEPS or any(one.skipped or one.norm != 0 for one in past) or not known:
        return None
    if len(known) < len(past):  # of a loss that is 0, or that nobody knows, zeros are no wonder
        return None
    return (
        f"all gradients were 0 in each of the last {len(past)} steps, at a loss scale of "
        f"{scale_text(past[-1].scale)}, although the loss was {min(known):.3g} to "
        f"{max(known):.3g}. Either they flushed to 0, being below 2^-25 in float16: raise the loss "
        "scale, or use bfloat16; or the loss does not depend on these parameters: look for "
        "detach(), no_grad(), units that are dead, or a clip to a norm of 0."
    )


def _only_skips(past: Sequence[Past]) -> str | None:
    if len(past) < SKIPS or not all(one.skipped for one in past):
        return None
    first, last = past[0].scale, past[-1].scale
    return (
        f"each of the last {len(past)} steps was skipped by an outside scaler, whose scale went "
        f"from {scale_text(first)} to {scale_text(last)}. A scale cannot help then: look at the "
        "loss, the input and last_step.overflowed(), or use mpcore.trace_overflow(model, batch)."
    )
