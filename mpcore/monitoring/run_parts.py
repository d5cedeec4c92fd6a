"""The parts of a run that was stopped and resumed, joined: each step once, as it was taken last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.records import Record
from mpcore.monitoring.report import OverflowReport

_Told = Reading | OverflowReport


class Chunk(NamedTuple):
    """What a monitor tells at once.

    Attributes:
        told: Readings and reports.
        course: Of the steps up to there; None if the run was stopped before.
        is_first: Whether it is the first of a monitor, or after a checkpoint was loaded.
    """

    told: tuple[_Told, ...]
    course: Course | None
    is_first: bool

    @property
    def start(self) -> int:
        """The first step in it."""
        records: list[Record] = [*self.told, *([] if self.course is None else [self.course])]
        return min(record.step for record in records)


def chunks_of(records: Iterable[Record]) -> Iterator[Chunk]:
    """Yields records as they were told together."""
    told: list[_Told] = []
    torn = True  # whether what comes next is of another part
    for record in records:
        if isinstance(record, Course):
            begins = bool(record.seconds) and record.seconds[0] is None
            yield Chunk(tuple(told), record, torn or begins)
            told, torn = [], False
        else:
            if told and _is_before(record, told):
                yield Chunk(tuple(told), None, torn)
                told, torn = [], True
            told.append(record)
    if told:
        yield Chunk(tuple(told), None, torn)


def _is_before(record: _Told, told: Sequence[_Told]) -> bool:
    same = [one.step for one in told if type(one) is type(record)]
    return record.step < told[-1].step or record.step in same


class Joined:
    """The parts of a run, joined.

    A part that begins at step 0 after others counts on from them: nobody can tell whether the same
    training went on without its optimizer's state. One that begins at another step was resumed from
    a checkpoint of it: what is known of that step and later ones is of steps that were thrown away.

    Attributes:
        courses: In order, each step once.
        readings: Likewise.
        overflows: Likewise.
        resumed: Steps at which a part began.
        repeated: Steps that were taken, told of, and taken again after a resume.
        missing: Steps before the last that nobody has told of.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.courses: list[Course] = []
        self.readings: list[Reading] = []
        self.overflows: list[OverflowReport] = []
        self.resumed: list[int] = []
        self.repeated = self.missing = 0
        self._base = 0  # what is added to the steps of this part
        for chunk in chunks_of(records):
            self._add(chunk)

    @property
    def _end(self) -> int:
        """The step after the last that a course holds."""
        return self.courses[-1].step + len(self.courses[-1].loss_scale) if self.courses else 0

    def _add(self, chunk: Chunk) -> None:
        start, end = chunk.start, self._end
        if self._is_another(chunk):
            if start == 0:
                self._base = end
            self._cut(self._base + start)
            if self._base + start:
                self.resumed.append(self._base + start)
        for record in chunk.told:
            moved = replace(record, step=record.step + self._base)
            (self.readings if isinstance(moved, Reading) else self.overflows).append(moved)  # type: ignore[arg-type]
        if chunk.course is not None:
            course = replace(chunk.course, step=chunk.course.step + self._base)
            if self.courses or self.resumed:
                self.missing += max(course.step - self._end, 0)
            self.courses.append(course)

    def _is_another(self, chunk: Chunk) -> bool:
        """Whether a chunk is the first of a part, and not of the run."""
        nothing = not (self.courses or self.readings or self.overflows)
        back = chunk.start + self._base < self._end
        return back or (chunk.is_first and not nothing)

    def _cut(self, at: int) -> None:
        """Forgets what is known of a step and of later ones."""
        self.readings = [reading for reading in self.readings if reading.step < at]
        self.overflows = [report for report in self.overflows if report.step < at]
        kept = []
        for course in self.courses:
            steps = len(course.loss_scale)
            count = min(max(at - course.step, 0), steps)
            self.repeated += steps - count
            if count:
                kept.append(course if count == steps else _first_of(course, count))
        self.courses = kept


def _first_of(course: Course, count: int) -> Course:
    names = [field.name for field in fields(course) if field.name != "step"]
    return replace(course, **{name: getattr(course, name)[:count] for name in names})
