"""Where readings and reports go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from mpcore.monitoring.history import Course
from mpcore.monitoring.records import Record
from mpcore.monitoring.report import OverflowReport


class JsonLines:
    """Appends each record to a file as one line of JSON, at once.

    Args:
        path: The file; it is made if it is not there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = JsonLines(os.path.join(folder, "run.jsonl"))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._goes_on = False

    def __call__(self, record: Record) -> None:
        """Writes a record."""
        line = json.dumps(record.to_dict(), allow_nan=False)
        with self._path.open("a+b") as file:
            if not self._goes_on and file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the run before was stopped in the middle of a line
                    file.write(b"\n")
            self._goes_on = True
            file.write(line.encode() + b"\n")


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> Any: ...

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any: ...


class TensorBoard:
    """Writes numbers as scalars and reports as text.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or what has its two methods.

    Example:
        >>> class Writer:
        ...     add_scalar = add_text = print
        >>> sink = TensorBoard(Writer())
    """

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    def __call__(self, record: Record) -> None:
        """Writes a record; of a course the loss scale and skips of each step."""
        if isinstance(record, OverflowReport):
            self._writer.add_text("mpcore/overflow", f"```\n{record}\n```", record.step)
            return
        if isinstance(record, Course):
            for i, (scale, skipped) in enumerate(
                zip(record.loss_scale, record.skipped, strict=True)
            ):
                self._writer.add_scalar("mpcore/course/loss_scale", scale, record.step + i)
                self._writer.add_scalar("mpcore/course/skipped", int(skipped), record.step + i)
            return
        for name, value in record.numbers().items():
            self._writer.add_scalar(f"mpcore/{name}", value, record.step)
