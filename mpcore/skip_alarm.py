"""A warning when nothing but skipped steps happens, which costs no sync."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

#: Steps. A search for the right scale takes fewer skips: from 2^32 down to 1 it is 32.
INTERVAL = 100


class SkipAlarm:
    """Warns if each of many steps in a row was skipped: no loss scale can help then.

    The number of skipped steps is counted on the device. Every `interval` steps a copy of it is
    sent to the host, and looked at when the next one is sent; a CPU's is looked at at once. So a
    warning comes after one to two intervals of skips, on a GPU one interval later.

    Args:
        interval: Steps between two looks.

    Example:
        >>> alarm, skipped = SkipAlarm(interval=2), torch.tensor(0)
        >>> for _ in range(4):
        ...     alarm.note(skipped.add_(1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        UserWarning: each of the last 2 steps was skipped...
    """

    def __init__(self, interval: int = INTERVAL) -> None:
        self._interval = interval
        self._steps = 0
        self._before: int | None = None  # a checkpoint may have brought any number
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None

    def note(self, skipped_steps: Tensor) -> None:
        """Counts a step; no host sync.

        Args:
            skipped_steps: 0-d integer, how many steps were skipped so far.
        """
        self._steps += 1
        if self._steps % self._interval:
            return
        if skipped_steps.device.type == "cpu":
            self._look(int(skipped_steps))
            return
        if self._sent is not None and self._sent[1].query():  # type: ignore[no-untyped-call]
            self._look(int(self._sent[0]))
        if skipped_steps.device.type == "cuda":
            copy = torch.empty((), dtype=skipped_steps.dtype, pin_memory=True)
            copy.copy_(skipped_steps, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._sent = (copy, event)

    def _look(self, skipped: int) -> None:
        before, self._before = self._before, skipped
        if before is not None and skipped - before >= self._interval:
            warnings.warn(
                f"each of the last {self._interval} steps was skipped because a gradient was not "
                "finite. The loss scale is as low as it gets or does not matter: look at the "
                "loss, the input and last_step.overflowed(), or lower the learning rate.",
                stacklevel=4,
            )
