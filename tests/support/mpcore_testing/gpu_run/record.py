"""What a part of the run leaves behind: rows, errors, what was not run. Needs no torch.

A part writes its file after every row, by renaming, so that whoever reads it, whenever a run is cut
off, finds a whole one.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there completely or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def to_json(value: Any) -> str:
    """JSON of plain values; infinities and NaNs become text, since JSON has none."""
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return repr(value)
    return value


class Recorder:
    """Collects the rows of one part.

    Args:
        path: The part's file.
        seconds: How long rows may be started.
        clock: Gives the time in seconds.

    Attributes:
        facts: What holds for all rows.
        rows: In the order in which they ran; one that failed has "error" and "traceback".
    """

    def __init__(
        self, path: Path, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.facts: dict[str, Any] = {}
        self.rows: list[Row] = []
        self._path = path
        self._not_run: list[str] = []
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds for which rows may still be started."""
        return self._end - self._clock()

    def row(self, name: str, measure: Callable[[], Row]) -> Row | None:
        """Runs `measure` unless the time is used, and keeps what it returns or raises.

        Returns:
            The row; None if it failed or was not run.
        """
        if self.left <= 0:
            self.skip([name])
            return None
        started = self._clock()
        try:
            row, failed = {"name": name, **measure()}, False
        except Exception as raised:  # whatever it is: the row tells it, and the next ones run
            row, failed = {"name": name, **described(raised)}, True
        row["seconds"] = round(self._clock() - started, 3)
        self.rows.append(row)
        self.save()
        self.say(f"{name}: {row['error'] if failed else 'done'} ({row['seconds']:.1f} s)")
        return None if failed else row

    def skip(self, names: Iterable[str]) -> None:
        """Notes rows that were not run because the time was used."""
        self._not_run += names
        self.save()

    def fact(self, **facts: Any) -> None:
        """Notes what holds for all rows."""
        self.facts.update(facts)
        self.save()

    def save(self) -> None:
        """Writes the part's file."""
        found = {"facts": self.facts, "rows": self.rows, "not_run": self._not_run}
        write_whole(self._path, to_json(found))

    def say(self, line: str) -> None:
        """Prints a line of progress."""
        print(" ".join(line.split()), flush=True)


def described(raised: BaseException) -> Row:
    """What is kept of an exception."""
    text = f"{type(raised).__name__}: {raised}"
    return {
        "error": " ".join(text.split())[:400],
        "traceback": "".join(traceback.format_exception(raised))[-6000:],
    }
