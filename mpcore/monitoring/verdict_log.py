"""Verdicts in the log: one line each, and each kind once in so many steps."""

from __future__ import annotations

import logging

from mpcore.monitoring.report import OverflowReport

_LOG = logging.getLogger("mpcore.monitor")


class VerdictLog:
    """Logs verdicts under "mpcore.monitor": INFO where nothing is wrong, else WARNING.

    Args:
        every: Steps from one line of a kind to the next.

    Example:
        >>> log = VerdictLog(100)
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._logged: dict[str, int] = {}

    def note(self, report: OverflowReport) -> None:
        """Logs a line unless one of its kind was logged less than `every` steps ago."""
        name = report.verdict.name
        last = self._logged.get(name)
        if last is not None and 0 <= report.step - last < self._every:
            return
        self._logged[name] = report.step
        level = logging.INFO if report.verdict.normal else logging.WARNING
        _LOG.log(level, report.one_line())
