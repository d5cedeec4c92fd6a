"""Which line of somebody's code is running."""

from __future__ import annotations

import linecache
import os
import sys
from types import CodeType, FrameType
from typing import NamedTuple

import torch

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_LIBRARIES = (os.path.dirname(_TORCH[:-1]) + os.sep, os.path.dirname(os.__file__) + os.sep)


class Line(NamedTuple):
    """A line of code. `str(line)` shows it.

    Example:
        >>> print(Line("/home/me/model.py", 7, "forward"))
        /home/me/model.py:7, in forward
    """

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.number).strip()
        return f"{self.file}:{self.number}, in {self.function}" + (f": {text}" if text else "")


def line_now(outermost: CodeType) -> Line | None:
    """Returns the line that runs, of code that is neither torch's nor ours; None if there is none.

    Of a library that was called by other code it is the line that called.

    Args:
        outermost: What ran this function or what called that; nothing further out counts.

    Example:
        >>> def outer():
        ...     return inner()
        >>> def inner():
        ...     return line_now(outer.__code__)
        >>> outer().function
        'inner'
    """
    frame: FrameType | None = sys._getframe(1)
    library: Line | None = None
    while frame is not None and frame.f_code is not outermost:
        file = frame.f_code.co_filename
        if not file.startswith((_HERE, _TORCH, "<frozen")):
            line = Line(file, frame.f_lineno, frame.f_code.co_name)
            if not file.startswith(_LIBRARIES):
                return line
            library = library or line
        frame = frame.f_back
    return library
