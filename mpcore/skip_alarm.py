"""A warning when nothing but skipped steps happens, which costs no sync."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

#: Steps. A search for the right scale takes fewer skips: from 2^32 down to 1 it is 32.
INTERVAL = 100


class SkipAlarm:
    """Warns if each of many steps in a row was skipped: no loss scale can help then.

    Steps are counted on the device. Every `interval` steps a copy of the counts is sent to the
    host, and looked at when the next one is sent; a CPU's is looked at at once. So a warning comes
    after one to two intervals of skips, on a GPU one interval later. Devices that are neither never
    warn.

    Args:
        interval: Steps between two looks.

    Example:
        >>> alarm, steps, skipped = SkipAlarm(interval=2), torch.tensor(0), torch.tensor(0)
        >>> for _ in range(4):
        ...     alarm.note(skipped.add_(1), steps.add_(1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        UserWarning: each of the last 2 steps was skipped...
    """

    def __init__(self, interval: int = INTERVAL) -> None:
        self._interval = interval
        self._steps = 0
        self._before: tuple[int, int] | None = None  # a checkpoint may have brought any number
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None

    def note(self, skipped_steps: Tensor, steps: Tensor) -> None:
        """Counts a step; no host sync.

        Args:
            skipped_steps: 0-d int64, how many steps were skipped so far.
            steps: 0-d int64, how many there were.
        """
        self._steps += 1
        if self._steps % self._interval:
            return
        if skipped_steps.device.type == "cpu":
            self._look(int(skipped_steps), int(steps))
            return
        if self._sent is not None and self._sent[1].query():  # type: ignore[no-untyped-call]
            self._look(*self._sent[0].tolist())
        if skipped_steps.device.type == "cuda":
            copy = torch.empty(2, dtype=torch.int64, pin_memory=True)
            copy.copy_(torch.stack([skipped_steps, steps]), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._sent = (copy, event)

    def _look(self, skipped: int, steps: int) -> None:
        before, self._before = self._before, (skipped, steps)
        if before is None:
            return
        # a copy may have been lost on the way: what is between two looks is one or more intervals
        passed = steps - before[1]
        if passed > 0 and skipped - before[0] >= passed:
            warnings.warn(
                f"each of the last {passed} steps was skipped because a gradient was not "
                "finite. The loss scale is as low as it gets or does not matter: look at the "
                "loss, the input and last_step.overflowed(), or lower the learning rate.",
                stacklevel=4,
            )
