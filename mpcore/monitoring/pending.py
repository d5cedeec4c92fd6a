"""Steps of a CUDA device: whether they were skipped comes to the host late, and nobody waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore.base import HostCopy, comes_late
from mpcore.engine import MixedPrecisionOptimizer, StepGradients, StepResult

#: Steps that the host may be ahead. CUDA queues about 1,000 launches and makes the host wait for
#: more; a watched step has dozens, so that nobody gets this far without waiting anyway.
LIMIT = 32


class Standing(NamedTuple):
    """Where the loss scale was after a step.

    Attributes:
        skipped: Whether that was.
        scale: Of the next one.
        steps: So far.
        skipped_steps: How many of them were skipped.
        skips_in_a_row: The last of them, without a clean step between.
    """

    skipped: bool
    scale: float
    steps: int
    skipped_steps: int
    skips_in_a_row: int


def counters_of(optimizer: MixedPrecisionOptimizer) -> Tensor:
    """Returns the counters of all its steps: whatever losses they had."""
    totals = optimizer._losses.totals
    return optimizer._scale.counters if totals is None else totals


def steps_taken(optimizer: MixedPrecisionOptimizer) -> int:
    """Returns how many steps an optimizer has taken or skipped; syncs unless there was none."""
    return int(counters_of(optimizer)[0]) if optimizer._began else 0


def standing_of(optimizer: MixedPrecisionOptimizer, found_inf: Tensor) -> Tensor:
    """Returns where the loss scale is now, float64 `[5]` in the order of `Standing`; no sync."""
    counts = counters_of(optimizer).narrow(0, 0, 3)
    parts = (found_inf.view(1), optimizer._scale.scale.view(1), counts)
    return torch.cat([part.to(optimizer._scale.scale.device, torch.float64) for part in parts])


class Step(NamedTuple):
    """A step that may have to be reported. It keeps no gradient alive, only what was found in them.

    Attributes:
        number: Counted from 0.
        gradients: What was found in them.
        result: How it ended.
        used_before: Which share of its format the largest gradient of the clean steps before took.
        own_scale: Whether the optimizer's own loss scale was used.
        sent: Where the loss scale was after it, on its way to the host; None: it is there still.
    """

    number: int
    gradients: StepGradients
    result: StepResult
    used_before: Tensor | None
    own_scale: bool
    sent: HostCopy | None

    def standing(self, optimizer: MixedPrecisionOptimizer) -> Standing:
        """Returns where the loss scale was after the step; syncs unless that was sent."""
        if self.sent is None:
            values = standing_of(optimizer, self.gradients.found_inf())
        else:
            values = self.sent.values
        skipped, scale, *counts = values.tolist()
        return Standing(skipped != 0, scale, *map(int, counts))


class Pending:
    """Steps whose outcome is on its way to the host, in order: at most `LIMIT`.

    None is lost: if there are more, the first is waited for. The device has work meanwhile, that of
    the steps after it. Nothing is sent or looked at while a CUDA graph is being captured.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[Step, HostCopy]] = deque()

    @staticmethod
    def on(device: torch.device) -> Pending | None:
        """Returns a new one, None where outcomes need not be sent."""
        return Pending() if comes_late(device) else None

    def send(self, optimizer: MixedPrecisionOptimizer, found_inf: Tensor) -> HostCopy | None:
        """Sends how a step has ended to the host; None if that is impossible now; no sync."""
        if torch.cuda.is_current_stream_capturing():
            return None
        return HostCopy(standing_of(optimizer, found_inf))

    def add(self, step: Step) -> None:
        """Takes in a step; one that was not sent is left out."""
        if step.sent is not None:
            self._steps.append((step, step.sent))

    def skipped(self, *, wait: bool) -> Iterator[Step]:
        """Yields the first steps if they were skipped, and forgets them.

        Args:
            wait: Whether to wait for all of them; otherwise only those come whose outcome has.
        """
        if self._steps and torch.cuda.is_current_stream_capturing():
            return
        while self._steps:
            step, sent = self._steps[0]
            if wait or len(self._steps) >= LIMIT:
                sent.wait()
            elif not sent.has_arrived():
                return
            self._steps.popleft()
            if sent.values.tolist()[0] != 0:
                yield step
