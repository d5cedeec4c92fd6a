"""What the commands share on the terminal: progress bars, tables, checks of output files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from mpcore.base import Table
from mpcore.errors import ArgumentError


class Bars:
    """One progress bar per run, in the order in which they began.

    Args:
        progress: Where to draw.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, label: str, total: int) -> Callable[[int, str], None]:
        """Adds a bar and returns what moves it: how much is done, and a note."""
        task = self._progress.add_task(label, total=total, note="")
        return lambda done, note: self._progress.update(task, completed=done, note=note)


def progress_on(console: Console) -> Progress:
    """Returns what `Bars` draws with.

    Args:
        console: Where to draw.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    return Progress(*columns, console=console)


def check_writable(output: Path, example: str, option: str = "output") -> None:
    """Raises unless a file can be written at `output`.

    Args:
        output: Where.
        example: A name for the advice.
        option: What the user calls it.

    Raises:
        ArgumentError: It is a folder, or its folder is missing or read-only.
    """
    folder = output.absolute().parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(
            f"{option}: expected a file in a folder that can be written to, got {output}. "
            f"Name a file, such as {example}."
        )


def show_table(table: Table, console: Console) -> None:
    """Prints a table with its notes below.

    Args:
        table: What to print.
        console: Where.
    """
    # tight enough for the widest table to fit 80 columns
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for index, cells in enumerate(zip(table.header, *table.rows, strict=True)):
        first = index == 0
        shown.add_column(
            Text("\n".join(cells[0].split())),
            # columns without a name hold bars
            justify="left" if first or not cells[0] else "right",
            no_wrap=first,
            # lines break between words: what is cut off a number makes it another one
            min_width=max(len(word) for cell in cells for word in [*cell.split(), ""]),
        )
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print()
    console.print(Text(table.title, style="bold"))
    console.print()
    console.print(shown)
    console.print()
    for note in table.notes:
        bullet = RichTable.grid(padding=(0, 1))
        bullet.add_row(Text("-", style="dim"), Text(note, style="dim"))
        console.print(bullet)
    console.print()
