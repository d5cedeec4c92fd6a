"""The last steps, kept on the device: added to without a sync, read with one."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mpcore.monitoring.facts import Past
from mpcore.monitoring.report import plain


@dataclass(frozen=True)
class Course:
    """What became of some steps in a row.

    Attributes:
        step: The first of them, counted from 0.
        loss_scale: Of each step.
        skipped: Whether it was.
        grad_norm: 2-norm of the unscaled gradients, before clipping.
        loss: Before scaling; None where nobody knows.
        seconds: On the host, since the end of the step before; None for the first of all.

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
        # scale, found_inf, norm, whether the loss is known, loss: float64
        self._rows: deque[Tensor] = deque(maxlen=window + spare)
        self._seconds: deque[float | None] = deque(maxlen=window + spare)
        self._ended: float | None = None

    def add(self, scale: Tensor, found_inf: Tensor, norm: Tensor, loss: Tensor | None) -> None:
        """Adds a step; no host sync.

        Args:
            scale: 0-d, of the step.
            found_inf: 0-d, not 0 if it was skipped.
            norm: 0-d, of the unscaled gradients.
            loss: 0-d, before scaling, if it is known.
        """
        none = torch.zeros((), dtype=torch.float64, device=self._device)
        known = none if loss is None else torch.ones_like(none)
        values = (scale, (found_inf != 0), norm, known, none if loss is None else loss)
        row = [
            value.detach().to(self._device, torch.float64, non_blocking=True) for value in values
        ]
        self._rows.append(torch.stack(row))
        now = time.perf_counter()
        self._seconds.append(None if self._ended is None else now - self._ended)
        self._ended = now
        self.steps += 1

    def holds(self, step: int) -> bool:
        """Returns whether a step, counted from 0, is still kept."""
        return self.steps - len(self._rows) <= step < self.steps

    def read(self, last: int, until: int | None = None) -> list[tuple[Past, float | None]]:
        """Returns so many steps, oldest first, each with its loss if that is known; syncs once.

        Args:
            last: How many.
            until: The last of them, which is kept; None: the last of all.
        """
        end = len(self._rows) if until is None else len(self._rows) - (self.steps - 1 - until)
        kept = list(self._rows)[max(0, end - last) : end]
        rows = torch.stack(kept).tolist() if kept else []
        return [
            (Past(scale, bool(skipped), norm), loss if known else None)
            for scale, skipped, norm, known, loss in rows
        ]

    def course(self, last: int) -> Course:
        """Returns what became of so many steps, or of all that are kept; syncs once."""
        rows = self.read(min(last, self._window))
        count = len(rows)
        return Course(
            step=self.steps - count,
            loss_scale=tuple(past.scale for past, _ in rows),
            skipped=tuple(past.skipped for past, _ in rows),
            grad_norm=tuple(past.norm for past, _ in rows),
            loss=tuple(loss for _, loss in rows),
            seconds=tuple(self._seconds)[len(self._seconds) - count :],
        )
