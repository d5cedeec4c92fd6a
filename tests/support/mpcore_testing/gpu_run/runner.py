"""Runs the parts, each in a process of its own, and keeps one JSON and one page up to date.

Needs no torch: a process that a bad kernel has ruined cannot take the results with it.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpcore_testing.gpu_run.page import to_page
from mpcore_testing.gpu_run.parts import Part
from mpcore_testing.gpu_run.record import to_json, write_whole

#: the command of a part, from its name, its file and its seconds
Command = Callable[[str, Path, float], Sequence[str]]
_STARTING = 30.0  # seconds that every part may have: reading torch from a cold disk takes some
_GRACE = 30.0  # seconds for a row that was started in time, as far as the whole run has them


class Run:
    """One run: what is known of it so far, and the files that say it.

    Args:
        out: The folder for `gpu.json` and `gpu.md`.
        mode: "full", "quick" or "rehearsal".
        command: Makes the command of a part.
        template: The page that results are put into.
        limit: Seconds for all parts.
        say: Prints a line.
    """

    def __init__(
        self,
        out: Path,
        mode: str,
        command: Command,
        template: str,
        limit: float,
        say: Callable[[str], None],
    ) -> None:
        self.found: dict[str, Any] = {"mode": mode, "started": _now(), "ended": None, "parts": {}}
        self._out = out
        self._command = command
        self._template = template
        self._end = time.monotonic() + limit
        self._say = say
        out.mkdir(parents=True, exist_ok=True)
        self._write()

    def run(self, parts: Sequence[Part]) -> None:
        """Runs all parts in order, whatever happens to one of them."""
        for number, part in enumerate(parts):
            shares = sum(other.share for other in parts[number:])
            left = self._end - time.monotonic()
            share = max(0.0, left) * part.share / shares
            self._run(part, max(share, min(_STARTING, left)), left)
        self.found["ended"] = _now()
        self._write()

    @property
    def complete(self) -> bool:
        """Whether every part came to its end and no row failed; bits that differ are results."""
        parts = self.found["parts"].values()
        rows = [row for part in parts for row in part.get("rows", ())]
        return all(part["status"] == "complete" for part in parts) and not any(
            "error" in row for row in rows
        )

    def _run(self, part: Part, seconds: float, left: float) -> None:
        if left <= 1:
            self._keep(part, {"status": "not run", "why": "the time of the whole run was used"})
            self._say(f"{part.name}: not run, the time is used")
            return
        self._say(f"{part.name}: {part.title}, rows start for {seconds:.0f} s")
        path = self._out / f"part-{part.name}.json"
        path.unlink(missing_ok=True)
        began = time.monotonic()
        status, tail = self._watch(part, path, seconds, min(left, seconds + _GRACE))
        entry = {"status": status, **_read(path), "took": round(time.monotonic() - began, 1)}
        if status != "complete":
            entry["output"] = tail
        self._keep(part, entry)
        path.unlink(missing_ok=True)
        self._say(f"{part.name}: {status} ({entry['took']:.0f} s)")

    def _watch(self, part: Part, path: Path, seconds: float, hard: float) -> tuple[str, list[str]]:
        """Runs a part to its end or to the hard limit; the files are kept up to date meanwhile."""
        process = subprocess.Popen(
            self._command(part.name, path, seconds),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_pump, args=(process, lines), daemon=True)
        reader.start()
        tail: list[str] = []
        end = time.monotonic() + hard
        try:
            while True:
                try:
                    line = lines.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    return f"cut off after {hard:.0f} s", tail
                if line is None:
                    return _meaning(process.wait()), tail
                tail = [*tail[-39:], line]
                self._say(f"  {line}")
                self._keep(part, {"status": "running", **_read(path)})
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join(timeout=5)  # what the part started may hold its output open

    def _keep(self, part: Part, entry: dict[str, Any]) -> None:
        self.found["parts"][part.name] = {"title": part.title, **entry}
        self._write()

    def _write(self) -> None:
        write_whole(self._out / "gpu.json", to_json(self.found))
        write_whole(self._out / "gpu.md", to_page(self.found, self._template))


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _meaning(code: int) -> str:
    if code == 0:
        return "complete"
    return f"failed: signal {-code}" if code < 0 else f"failed: exit status {code}"


def _read(path: Path) -> dict[str, Any]:
    """What a part has written so far."""
    if not path.is_file():
        return {"facts": {}, "rows": [], "not_run": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def stamped(line: str) -> None:
    """Prints a line after the time."""
    print(f"{datetime.now().strftime('%H:%M:%S')} {line}", file=sys.stdout, flush=True)
