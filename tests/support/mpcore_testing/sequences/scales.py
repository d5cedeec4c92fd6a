"""By what rule each loss scale of the sequences should move, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST = 2.0**4


@dataclass
class Scale:
    """Where a loss scale should be.

    Attributes:
        name: A key of `SCALES`.
        now: What the next loss is multiplied by.
        clean: Clean steps since it grew or a step was skipped; for headroom since a window began.
        left: Overflows that are tolerated before it falls.
        peaks: For headroom: largest gradients of this half of the window and of the one before.
    """

    name: str
    now: float = FIRST
    clean: int = 0
    left: int = 1
    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0
    peaks: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def first(cls, name: str) -> Scale:
        return cls(name, 1.0 if name == "none" else FIRST, left=2 if name == "hysteresis" else 1)

    @property
    def moves(self) -> bool:
        return self.name not in ("static", "none")

    def count(self, *, overflow: bool, largest: float) -> None:
        """Ends a step; `largest` is that of its float16 gradients, unscaled."""
        self.steps += 1
        self.skipped += overflow
        self.in_a_row = self.in_a_row + 1 if overflow else 0
        if self.name == "headroom":
            self._look_at(overflow, largest)
        elif self.moves:
            self._search(overflow)

    def _search(self, overflow: bool) -> None:
        patience = 2 if self.name == "hysteresis" else 1
        interval = 1 if self.name == "hysteresis" else 2
        lowest = 2.0 if self.name == "hysteresis" else 1.0
        if overflow:
            self.clean, self.left = 0, max(self.left - 1, 0)
            if self.left == 0:
                self.now = max(self.now / 2, lowest)
            return
        self.clean += 1
        if self.clean == interval:
            self.clean, self.left = 0, patience
            self.now = min(self.now * 2, 2.0**12)

    def _look_at(self, overflow: bool, largest: float) -> None:
        """float16 ends at 2^16; two powers of two stay free, and a window of 4 has halves of 2."""
        here, before = self.peaks
        if overflow:
            self.now = max(self.now / 2, 1.0)
            self.peaks = max(here, 2.0**13 / self.now), before
            return
        here = max(here, largest)
        if max(here, before) > 0:
            above = 2.0 ** math.frexp(max(here, before))[1]
            self.now = min(max(2.0**14 / above, 1.0), 2.0**16)
        self.peaks = here, before
        self.clean += 1
        if self.clean == 2:
            self.clean, self.peaks = 0, (0.0, here)
