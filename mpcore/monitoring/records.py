"""Records that `JsonLines` wrote, read again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpcore.errors import ArgumentError
from mpcore.masters import Overflow
from mpcore.monitoring.findings import Finding
from mpcore.monitoring.history import Course
from mpcore.monitoring.memory import Resident
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.report import OverflowReport
from mpcore.monitoring.verdicts import Verdict

Record = Reading | OverflowReport | Course

_BEGINNING = '{"kind": "'


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Returns the records of a file that `JsonLines` wrote, in its order.

    Lines that were cut off are left out: a run was stopped while it wrote them.

    Args:
        path: The file.

    Raises:
        ArgumentError: There is no such file, or a line of it is no record.

    Example:
        >>> import tempfile
        >>> from mpcore import JsonLines
        >>> course = Course(0, (8.0,), (True,), (float("inf"),), (None,), (None,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     JsonLines(os.path.join(folder, "run.jsonl"))(course)
        ...     read_records(os.path.join(folder, "run.jsonl")) == [course]
        True
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"path: expected a file that mpcore.JsonLines wrote, got {os.fspath(path)}: {error}."
        ) from error
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, json.JSONDecodeError) and line.startswith(_BEGINNING):
                continue  # cut off
            raise ArgumentError(
                f"{os.fspath(path)}, line {number}: expected a record that mpcore.JsonLines wrote, "
                f"got {line[:80]!r}. Give the file of one run, as it was written."
            ) from error
    return records


def _record(entry: dict[str, Any]) -> Record:
    entry = dict(entry)
    return _MAKERS[entry.pop("kind")](entry)


def _reading(entry: dict[str, Any]) -> Reading:
    memory = entry.pop("memory", None)
    findings = tuple(map(_finding, entry.pop("findings")))
    return Reading(
        **_numbers(entry),
        findings=findings,
        memory=None if memory is None else Resident(**memory),
    )


def _overflow(entry: dict[str, Any]) -> OverflowReport:
    findings = tuple(map(_finding, entry.pop("findings")))
    verdict = Verdict(**entry.pop("verdict"))
    passes = tuple(Overflow(at, loss, tuple(names)) for at, loss, names in entry.pop("passes"))
    return OverflowReport(**_numbers(entry), findings=findings, verdict=verdict, passes=passes)


def _finding(entry: dict[str, Any]) -> Finding:
    text = {key: entry.pop(key) for key in ("name", "dtype")}  # which may be "inf" as well
    return Finding(**text, kinds=tuple(entry.pop("kinds")), **_numbers(entry))


def _course(entry: dict[str, Any]) -> Course:
    return Course(**_numbers(entry))


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in entry.items()}


def _number(value: Any) -> Any:
    """Returns what JSON could not hold: tuples, and numbers that are not finite."""
    if isinstance(value, list):
        return tuple(map(_number, value))
    if isinstance(value, str):
        return float(value)
    return value


_MAKERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "reading": _reading,
    "overflow": _overflow,
    "course": _course,
}
