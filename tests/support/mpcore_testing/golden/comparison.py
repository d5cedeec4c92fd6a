"""What moved between two recordings of a case, where first, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpcore_testing.golden.recording import KINDS, Recording


@dataclass(frozen=True)
class Move:
    """A kind of value that is not what was recorded.

    Attributes:
        step: The first step after which it differs, from 0.
        kind: One of `KINDS`, or "steps".
        detail: By how much, as far as that is known.
    """

    step: int
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind}{self.detail and ': '}{self.detail}"


def compare(recorded: Recording, fresh: Recording, *, prefix: bool = False) -> list[Move]:
    """Returns what moved, first things first; empty if nothing did.

    Args:
        recorded: Of before.
        fresh: Of now.
        prefix: Whether `fresh` may end earlier.
    """
    steps = min(recorded.steps, fresh.steps)
    moves = []
    for kind in KINDS:
        old, new = recorded.after[kind], fresh.after[kind]
        first = next((n for n in range(steps) if old[n] != new[n]), None)
        if first is not None:
            moves.append(Move(first, kind, _detail(recorded, fresh, kind, first)))
    if fresh.steps != recorded.steps and not (prefix and fresh.steps < recorded.steps):
        moves.append(Move(steps, "steps", f"{recorded.steps} recorded, {fresh.steps} now"))
    return sorted(moves, key=lambda move: move.step)  # stable: kinds stay in order


def _detail(recorded: Recording, fresh: Recording, kind: str, step: int) -> str:
    old, new = recorded.after[kind][step], fresh.after[kind][step]
    if not isinstance(old, str):
        return f"{_short(old)} -> {_short(new)}"
    if "-" in (old, new):
        return "none recorded, some now" if old == "-" else "some recorded, none now"
    if recorded.values is None or fresh.values is None or kind not in recorded.values:
        return ""
    before, now = recorded.values[kind][step], fresh.values[kind][step]
    if len(before) != len(now):
        return f"{len(before) // 4} values recorded, {len(now) // 4} now"
    if before == now:
        return "other dtypes or shapes, the same bits"
    return _distance(before, now)


def _short(numbers: list[Any]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _distance(before: bytes, now: bytes) -> str:
    """Returns how far float32 values are apart: units in the last place, from number to number."""
    old, new = (np.frombuffer(content, "<f4") for content in (before, now))
    moved = old.view("<i4") != new.view("<i4")
    far = np.abs(_places(old) - _places(new))[moved & np.isfinite(old) & np.isfinite(new)]
    words = [f"{moved.sum()} of {moved.size} values"]
    if far.size:
        words.append(f"at most {far.max()} ULP")
    if far.size < moved.sum():
        words.append(f"{moved.sum() - far.size} not finite before or now")
    return ", ".join(words)


def _places(values: Any) -> Any:
    """Numbers float32 values in their order, so that neighbours differ by 1; both zeros are 0."""
    patterns = values.view("<i4").astype(np.int64)
    return np.where(patterns < 0, -(patterns & 0x7FFFFFFF), patterns)
