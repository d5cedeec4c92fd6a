"""How many values the test suite compared bit for bit, and how long the tests took that did."""

from __future__ import annotations

from dataclasses import dataclass

#: under which name a test's report carries its numbers from a worker to the process that prints
PROPERTY = "bitwise comparisons"


@dataclass
class Tally:
    """Values compared bit for bit in this process so far."""

    values: int = 0

    def add(self, values: int) -> None:
        """Counts a comparison of `values` pairs."""
        self.values += values


#: one per process: the comparisons below it are plain functions, called from anywhere in a test
TALLY = Tally()


def summary(reports):
    """The line that a run ends with, from the reports of all its tests; empty without comparisons.

    Example:
        >>> from types import SimpleNamespace
        >>> report = SimpleNamespace(user_properties=[(PROPERTY, 65536)], duration=1.5, when="call")
        >>> summary([report, report])
        '131,072 values compared bit for bit, by 2 tests that took 3 s together'
    """
    counted = [
        (value, report.duration)
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not counted:
        return ""
    values, seconds = (sum(column) for column in zip(*counted, strict=True))
    tests = f"{len(counted)} tests that took {seconds:.0f} s together"
    return f"{values:,} values compared bit for bit, by {tests}"
