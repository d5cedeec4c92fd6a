"""A run as its records tell it: every step in a row, readings, and what overflowed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.records import Record, Records, read_records
from mpcore.monitoring.report import OverflowReport
from mpcore.monitoring.run_parts import Joined


@dataclass(frozen=True)
class RunLog:
    """What a `Monitor` told of a run.

    Attributes:
        name: Of the run.
        courses: What became of its steps, in order.
        readings: Of its gradients.
        overflows: Reports on skipped steps.
        resumed: Steps at which a monitor began anew.
        repeated: Steps that were taken, told of, and taken again after a resume.
        missing: Steps before the last that nobody has told of, of a run that was stopped.
        torn: Lines of its files that were cut off.

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
    repeated: int = 0
    missing: int = 0
    torn: int = 0

    @staticmethod
    def of(name: str, records: Iterable[Record]) -> RunLog:
        """Returns the log of records in the order in which sinks got them.

        The parts of a run that was resumed are joined. A part has the steps of its checkpoint, and
        what an earlier part knew of these is left out: they were thrown away. A part that begins
        at step 0 again, whose optimizer's state was not loaded, counts on from what is known.
        """
        joined = Joined(records)
        return RunLog(
            name,
            tuple(joined.courses),
            tuple(joined.readings),
            tuple(joined.overflows),
            resumed=tuple(joined.resumed),
            repeated=joined.repeated,
            missing=joined.missing,
            torn=records.torn if isinstance(records, Records) else 0,
        )

    @staticmethod
    def read(path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> RunLog:
        """Returns the log that `JsonLines` wrote to a file, under the name of the file.

        Args:
            path: The file.
            more: Of further parts of the run, in order.

        Raises:
            ArgumentError: It is no such file.
        """
        return RunLog.of(Path(path).stem, read_records(path, *more))

    def told(self) -> str:
        """Returns what became of the parts of the run, in a sentence; empty if it has one.

        Example:
            >>> RunLog("run", (), (), (), resumed=(30,), repeated=12, torn=1).told()
            'Resumed at step 30; 12 steps were taken again; 1 line of the log was cut off.'
        """
        steps = ", ".join(f"{step:,}" for step in self.resumed[:3])
        more = f" and {len(self.resumed) - 3} more" if len(self.resumed) > 3 else ""
        parts = [f"resumed at step {steps}{more}"] if self.resumed else []
        for count, what, became in (
            (self.repeated, "step", "taken again"),
            (self.missing, "step", "not recorded"),
            (self.torn, "line of the log", "cut off"),
        ):
            if count:
                plural = what.replace("step", "steps").replace("line", "lines")
                one = count == 1
                parts.append(
                    f"{count:,} {what if one else plural} {'was' if one else 'were'} {became}"
                )
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}." if text else ""

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
