"""Warnings about a loss scale that cannot help, and errors where they were asked for; no sync."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from mpcore.base import HostCopy
from mpcore.errors import LossScaleError

#: Steps. A search for the right scale takes fewer skips: from 2^32 down to 1 it is 32.
INTERVAL = 100


class SkipAlarm:
    """Watches the counters of a loss scale.

    Warns if each of `interval` steps in a row was skipped: no loss scale can help then. Warns or
    raises, if told to, when a step overflows at the minimum of the scale.

    Counters are on the device. Every `interval` steps, every step if `at_min` is not "clamp", a
    copy of them is sent to the host unless another is on its way, and looked at when a later one is
    sent; a CPU's are looked at at once. Devices that are neither CPUs nor CUDA's never warn, nor do
    steps that a CUDA graph replays: Python does not hear of them.

    Args:
        at_min: "clamp", "warn" or "raise": see `DynamicLossScale`.
        interval: Steps.
        overflows_at_min: What the counter is now.

    Example:
        >>> alarm, counters = SkipAlarm(interval=2), torch.zeros(6, dtype=torch.int64)
        >>> for _ in range(2):
        ...     counters[:3] += 1
        ...     alarm.note(counters)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        UserWarning: each of the last 2 steps was skipped...
    """

    def __init__(
        self, at_min: str = "clamp", interval: int = INTERVAL, overflows_at_min: int = 0
    ) -> None:
        self._at_min = at_min
        self._interval = interval
        self._steps = 0
        self._warned_at = -interval  # steps that the counters had when a row of skips was reported
        self._at_min_before = overflows_at_min
        self._sent: HostCopy | None = None

    def __getstate__(self) -> dict[str, object]:
        # a copy on its way has an event of the device, which nobody can copy or pickle
        return {**self.__dict__, "_sent": None}

    def note(self, counters: Tensor) -> None:
        """Counts a step; no host sync.

        Args:
            counters: int64 `[6]`, those of a loss scale after the step.

        Raises:
            LossScaleError: A step overflowed at the minimum and `at_min` is "raise".
        """
        self._steps += 1
        if self._at_min == "clamp" and self._steps % self._interval:
            return
        known = None
        if counters.device.type == "cpu":
            known = counters
        elif counters.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            known = self._exchange(counters)
        if known is not None:
            self._look(*known.tolist()[:4])

    def _exchange(self, counters: Tensor) -> Tensor | None:
        """Returns the copy that was sent last if it has arrived, and sends another one then."""
        sent = self._sent
        if sent is not None and not sent.has_arrived():
            return None
        self._sent = HostCopy(counters)
        return None if sent is None else sent.values

    def _look(self, steps: int, skipped: int, in_a_row: int, at_min: int) -> None:
        if in_a_row >= self._interval and steps - self._warned_at >= self._interval:
            self._warned_at = steps
            warnings.warn(
                f"each of the last {in_a_row} steps was skipped because a gradient was not "
                "finite. The loss scale is as low as it gets or does not matter: look at the "
                "loss, the input and last_step.overflowed(), or lower the learning rate.",
                stacklevel=4,
            )
        before, self._at_min_before = self._at_min_before, at_min
        if self._at_min == "clamp" or at_min <= before:
            return
        message = (
            f"a step was skipped although the loss scale was at its minimum ({skipped} of {steps} "
            "steps were skipped so far). Lower min_scale, or look at the loss, the input and "
            "last_step.overflowed(): a gradient may not be finite whatever the scale."
        )
        if self._at_min == "raise":
            raise LossScaleError(message)
        warnings.warn(message, stacklevel=4)
