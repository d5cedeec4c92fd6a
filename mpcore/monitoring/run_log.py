"""A run as its records tell it: every step in a row, readings, and what overflowed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.records import Record, read_records
from mpcore.monitoring.report import OverflowReport

_R = TypeVar("_R", Reading, OverflowReport, Course)


@dataclass(frozen=True)
class RunLog:
    """What a `Monitor` told of a run.

    Attributes:
        name: Of the run.
        courses: What became of its steps, in order.
        readings: Of its gradients.
        overflows: Reports on skipped steps.
        resumed: Steps at which a monitor began anew.

    Example:
        >>> course = Course(0, (8.0, 4.0), (True, False), (1.0, 1.0), (None, 0.5), (None, 0.1))
        >>> log = RunLog.of("run", [course, course])
        >>> log.steps, log.resumed, [step for step, _ in log.losses]
        ([0, 1, 2, 3], (2,), [1, 3])
    """

    name: str
    courses: tuple[Course, ...]
    readings: tuple[Reading, ...]
    overflows: tuple[OverflowReport, ...]
    resumed: tuple[int, ...] = ()

    @staticmethod
    def of(name: str, records: Iterable[Record]) -> RunLog:
        """Returns the log of records in the order in which sinks got them.

        Steps are counted through: where a monitor began to count anew, in a run that was resumed,
        they go on from the last one that is known.
        """
        courses: list[Course] = []
        readings: list[Reading] = []
        overflows: list[OverflowReport] = []
        resumed: list[int] = []
        base = covered = 0  # where this monitor began; steps that its courses hold
        waiting: list[Reading | OverflowReport] = []  # for the course that follows them
        for record in [*records, None]:
            if record is not None and not isinstance(record, Course):
                waiting.append(record)
                continue
            first = min([r.step for r in (record, *waiting) if r is not None], default=covered)
            if first < covered:
                base, covered = base + covered, 0
                resumed.append(base)
            readings += [_moved(r, base) for r in waiting if isinstance(r, Reading)]
            overflows += [_moved(r, base) for r in waiting if isinstance(r, OverflowReport)]
            waiting.clear()
            if record is not None:
                courses.append(_moved(record, base))
                covered = record.step + len(record.loss_scale)
        return RunLog(name, tuple(courses), tuple(readings), tuple(overflows), tuple(resumed))

    @staticmethod
    def read(path: str | os.PathLike[str]) -> RunLog:
        """Returns the log that `JsonLines` wrote to a file, under the name of the file.

        Raises:
            ArgumentError: It is no such file.
        """
        return RunLog.of(Path(path).stem, read_records(path))

    @property
    def steps(self) -> list[int]:
        """All steps that are known."""
        return [course.step + i for course in self.courses for i in range(len(course.loss_scale))]

    @property
    def scales(self) -> list[float]:
        """The loss scale of each of `steps`."""
        return [scale for course in self.courses for scale in course.loss_scale]

    @property
    def skipped(self) -> list[tuple[int, float]]:
        """Skipped steps, each with its loss scale."""
        flags = [skipped for course in self.courses for skipped in course.skipped]
        together = zip(self.steps, self.scales, flags, strict=True)
        return [(step, scale) for step, scale, skipped in together if skipped]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Steps whose loss is known, each with its loss."""
        losses = [loss for course in self.courses for loss in course.loss]
        together = zip(self.steps, losses, strict=True)
        return [(step, loss) for step, loss in together if loss is not None]

    @property
    def seconds(self) -> list[float]:
        """What steps took, from the end of one to the end of the next; the first is not known."""
        seconds = [taken for course in self.courses for taken in course.seconds]
        return [taken for taken in seconds if taken is not None]


def _moved(record: _R, base: int) -> _R:
    return replace(record, step=record.step + base) if base else record
