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


class Records(list[Record]):
    """Records in the order of their files.

    Attributes:
        torn: Lines that were cut off, since a run was stopped while it wrote them.
    """

    torn: int = 0


def read_records(path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Records:
    """Returns the records of files that `JsonLines` wrote, in their order.

    Lines that were cut off are left out and counted: a run was stopped while it wrote them.

    Args:
        path: The file.
        more: Of further parts of the same run, in order.

    Raises:
        ArgumentError: There is no such file, or a line of it is no record.

    Example:
        >>> import tempfile
        >>> from mpcore import JsonLines
        >>> course = Course(0, (8.0,), (True,), (float("inf"),), (None,), (None,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     JsonLines(os.path.join(folder, "run.jsonl"))(course)
        ...     records = read_records(os.path.join(folder, "run.jsonl"))
        >>> records == [course], records.torn
        (True, 0)
    """
    records = Records()
    for one in (path, *more):
        *lines, rest = _text_of(one).split("\n")
        records.torn += bool(rest)
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_record(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if isinstance(error, json.JSONDecodeError) and _is_cut_off(line, number):
                    records.torn += 1
                    continue
                raise ArgumentError(
                    f"{os.fspath(one)}, line {number}: expected a record that mpcore.JsonLines "
                    f"wrote, got {line[:80]!r}. Give the file of one run, as it was written."
                ) from error
    return records


def _text_of(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"path: expected a file that mpcore.JsonLines wrote, got {os.fspath(path)}: {error}."
        ) from error


def _is_cut_off(line: str, number: int) -> bool:
    """Whether a line is the beginning of a record; a few signs only after one that was."""
    return line.startswith(_BEGINNING) or (
        number > 1 and line != "" and _BEGINNING.startswith(line)
    )


def _record(entry: dict[str, Any]) -> Record:
    entry = dict(entry)
    return _MAKERS[entry.pop("kind")](entry)


def _reading(entry: dict[str, Any]) -> Reading:
    memory = entry.pop("memory", None)
    findings = tuple(map(_finding, entry.pop("findings")))
    activations = tuple(map(_finding, entry.pop("activations", ())))
    return Reading(
        **_numbers(entry),
        findings=findings,
        activations=activations,
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
