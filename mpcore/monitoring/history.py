"""The last steps, kept on the device: added to without a sync, read with one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mpcore.monitoring.facts import PassLoss, Past
from mpcore.monitoring.report import plain


@dataclass(frozen=True)
class Course:
    """What became of some steps in a row.

    Attributes:
        step: The first of them, counted from 0.
        loss_scale: Of each step.
        skipped: Whether it was.
        grad_norm: 2-norm of the unscaled gradients, before clipping.
        loss: Before scaling, the sum of those of its backward passes; None where nobody knows.
        seconds: On the host, since the end of the step before; None for the first of a monitor and
            the first after a checkpoint was loaded.
        largest_loss: The largest of these; None likewise.

    Example:
        >>> course = Course(7, (8.0,), (True,), (float("inf"),), (0.5,), (None,))
        >>> course.to_dict()["grad_norm"]
        ['inf']
    """

    step: int
    loss_scale: tuple[float, ...]
    skipped: tuple[bool, ...]
    grad_norm: tuple[float, ...]
    loss: tuple[float | None, ...]
    seconds: tuple[float | None, ...]
    largest_loss: tuple[float | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and strings; what is not finite becomes a string, as JSON wants."""
        return {"kind": "course", **plain(asdict(self))}


class History:
    """The last steps.

    Args:
        window: How many.
        device: Where the loss scale is.
        spare: How many more are kept for those that ask late.
    """

    def __init__(self, window: int, device: torch.device, spare: int = 0) -> None:
        self.steps = 0
        self._window = window
        self._device = device
        # scale, found_inf, norm, and the losses that are known: float64
        self._rows: deque[Tensor] = deque(maxlen=window + spare)
        # of each backward pass the name of its loss, and whether that is known
        self._passes: deque[list[tuple[str, bool]]] = deque(maxlen=window + spare)
        self._seconds: deque[float | None] = deque(maxlen=window + spare)
        self._ended: float | None = None

    def add(
        self,
        scale: Tensor,
        found_inf: Tensor,
        norm: Tensor,
        losses: Sequence[tuple[str, Tensor | None]] = (),
    ) -> None:
        """Adds a step; no host sync.

        Args:
            scale: 0-d, of the step.
            found_inf: 0-d, not 0 if it was skipped.
            norm: 0-d, of the unscaled gradients.
            losses: Of its backward passes, in order: name and value, 0-d, before scaling; None if
                it is not known.
        """
        known = [loss for _, loss in losses if loss is not None]
        row = [
            value.detach().to(self._device, torch.float64, non_blocking=True)
            for value in (scale, (found_inf != 0), norm, *known)
        ]
        self._rows.append(torch.stack(row))
        self._passes.append([(name, loss is not None) for name, loss in losses])
        now = time.perf_counter()
        self._seconds.append(None if self._ended is None else now - self._ended)
        self._ended = now
        self.steps += 1

    def restart(self, steps: int) -> None:
        """Forgets all steps; the next one has this number."""
        self._rows.clear()
        self._passes.clear()
        self._seconds.clear()
        self._ended, self.steps = None, steps

    def holds(self, step: int) -> bool:
        """Returns whether a step, counted from 0, is still kept."""
        return self.steps - len(self._rows) <= step < self.steps

    def read(self, last: int, until: int | None = None) -> list[Past]:
        """Returns so many steps, oldest first; syncs once.

        Args:
            last: How many.
            until: The last of them, which is kept; None: the last of all.
        """
        end = len(self._rows) if until is None else len(self._rows) - (self.steps - 1 - until)
        some = slice(max(0, end - last), end)
        rows, passes = list(self._rows)[some], list(self._passes)[some]
        values = iter(torch.cat(rows).tolist() if rows else ())
        found = []
        for each in passes:
            scale, skipped, norm = next(values), next(values), next(values)
            losses = [PassLoss(name, next(values) if known else None) for name, known in each]
            found.append(Past(scale, bool(skipped), norm, tuple(losses)))
        return found

    def course(self, last: int) -> Course:
        """Returns what became of so many steps, or of all that are kept; syncs once."""
        rows = self.read(min(last, self._window))
        count = len(rows)
        return Course(
            step=self.steps - count,
            loss_scale=tuple(past.scale for past in rows),
            skipped=tuple(past.skipped for past in rows),
            grad_norm=tuple(past.norm for past in rows),
            loss=tuple(past.loss for past in rows),
            seconds=tuple(self._seconds)[len(self._seconds) - count :],
            largest_loss=tuple(past.largest_loss for past in rows),
        )
