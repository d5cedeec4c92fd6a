"""`mpcore demo` on the terminal: progress bars, tables, and the report's file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mpcore.cli.output import Bars, check_writable, progress_on, show_table
from mpcore.demo.experiment import DemoSettings, run_demo
from mpcore.demo.report import render_report
from mpcore.demo.tables import digits_table, gpt_table


def run_and_show(settings: DemoSettings, output: Path, console: Console) -> None:
    """Runs the demo, prints its tables and writes its report.

    Args:
        settings: What to run.
        output: Where to write the report.
        console: Where to print.

    Raises:
        ArgumentError: The report cannot be written there; found out before anything runs.
    """
    check_writable(output, "mpcore-demo.html")
    with progress_on(console) as progress:
        result = run_demo(settings, Bars(progress))
    for table in (gpt_table(result), digits_table(result)):
        show_table(table, console)
    output.write_text(render_report(result), encoding="utf-8")
    console.print(f"Took {result.seconds:.0f} s. Report: ", end="")
    console.print(str(output), style="bold", soft_wrap=True, highlight=False)
