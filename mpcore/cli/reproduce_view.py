"""`mpcore reproduce` on the terminal: progress bars, tables, and a file of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mpcore.base import check_count
from mpcore.cli.output import Bars, check_writable, progress_on, show_table
from mpcore.demo.reproduce.experiments import chosen, reproduce


def reproduce_and_show(
    names: Sequence[str],
    *,
    seeds: int,
    quick: bool,
    threads: int,
    output: Path | None,
    console: Console,
) -> None:
    """Runs experiments and prints their tables, one after the other.

    Args:
        names: Of experiments; all without one.
        seeds: How many.
        quick: One epoch each.
        threads: CPU threads.
        output: Where to write the tables as Markdown, if anywhere.
        console: Where to print.

    Raises:
        ArgumentError: A name is unknown, a count below 1, or the file cannot be written.
    """
    experiments = chosen(names)
    check_count("seeds", seeds)
    check_count("threads", threads)
    if output is not None:
        check_writable(output, "tables.md")
    pages = []
    for name in experiments:
        with progress_on(console) as progress:
            tables = reproduce(
                name, seeds=seeds, quick=quick, threads=threads, progress=Bars(progress)
            )
        for table in tables:
            show_table(table, console)
        pages += [table.to_markdown() for table in tables]
    if output is not None:
        output.write_text("\n".join(pages), encoding="utf-8")
