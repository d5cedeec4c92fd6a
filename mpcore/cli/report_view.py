"""`mpcore report` on the terminal: the files of runs in, one page out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mpcore.cli.json_view import run_facts, to_json
from mpcore.cli.output import check_writable, show_table
from mpcore.errors import ArgumentError
from mpcore.monitoring.run_log import RunLog
from mpcore.report.run_page import render_runs, summary_table


def write_report(
    runs: Sequence[Path], output: Path, title: str, console: Console | None, *, join: bool = False
) -> None:
    """Reads the files of runs, prints what they come to and writes their page.

    Args:
        runs: What `mpcore.JsonLines` wrote.
        output: Where to write the page.
        title: Of the page.
        console: Where to print; None: as JSON to standard output.
        join: Whether the files are parts of one run, in order.

    Raises:
        ArgumentError: A file is none of a run, or the page cannot be written.
    """
    check_writable(output, "mpcore-report.html")
    first = runs[:1] if join else runs
    logs = [RunLog.read(*runs)] if join else [RunLog.read(path) for path in runs]
    for path, log in zip(first, logs, strict=True):
        if not (log.courses or log.readings or log.overflows):
            raise ArgumentError(f"runs: expected records, got none in {path}. Was a step made?")
    logs = [replace(log, name=name) for log, name in zip(logs, names_of(first), strict=True)]
    output.write_text(render_runs(logs, title), encoding="utf-8")
    if console is None:
        print(to_json({"runs": [run_facts(log) for log in logs], "report": str(output)}))
        return
    show_table(replace(summary_table(logs), title=title), console)
    for log in logs:
        if log.told():
            console.print(Text(f"{log.name}: {log.told()}"), soft_wrap=True)
    console.print("Report: ", end="")
    console.print(Text(str(output), "bold"), soft_wrap=True)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Returns names for files: their own, with as many folders as it takes to tell them apart.

    Raises:
        ArgumentError: One is there twice.

    Example:
        >>> names_of([Path("run.jsonl")]), names_of([Path("a/run.jsonl"), Path("b/run.jsonl")])
        (['run'], ['a/run', 'b/run'])
        >>> names_of([Path("run.1"), Path("run.2")])
        ['run.1', 'run.2']
    """
    for suffixes in (False, True):  # run.1 and run.2 differ in theirs
        whole = [path.absolute() for path in paths]
        parts = [(path if suffixes else path.with_suffix("")).parts for path in whole]
        for length in range(1, max(map(len, parts)) + 1):
            names = ["/".join(part[-length:]) for part in parts]
            if len(set(names)) == len(names):
                return names
    raise ArgumentError(f"runs: expected each file once, got {', '.join(map(str, paths))}.")
