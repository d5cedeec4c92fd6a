"""Errors in a user's own file: which line of it, without the lines of whoever called it."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import mpcore

_NOT_THEIRS = (
    Path(mpcore.__file__).parent,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
)


class UserCodeError(Exception):
    """A user's own code raised; the text names its line.

    Args:
        error: What it raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(place_of(error))
        #: The lines of a traceback, from the user's first one on.
        self.lines = trimmed(error)


def place_of(error: BaseException) -> str:
    """Returns file, line and function of the user's code that an error came from, and the error.

    Args:
        error: What was raised.

    Example:
        >>> place_of(ValueError("no number"))
        'ValueError: no number'
    """
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [*_theirs(error.__traceback__)]
    if not frames:
        return said
    (last,) = traceback.extract_tb(frames[-1], limit=1)
    return f"{last.filename}:{last.lineno}, in {last.name}: {last.line}\n  {said}"


def trimmed(error: BaseException) -> str:
    """Returns a traceback that begins in the user's code; empty if none of that was running."""
    frames = [*_theirs(error.__traceback__)]
    if not frames:
        return ""
    return "".join(traceback.format_exception(type(error), error, frames[0]))


def _theirs(trace: TracebackType | None) -> Iterator[TracebackType]:
    """Yields the places in files that belong neither to mpcore nor to what is installed."""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith("<") and not any(map(Path(name).is_relative_to, _NOT_THEIRS)):
            yield trace
        trace = trace.tb_next
