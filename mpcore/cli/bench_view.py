"""`mpcore bench` on the terminal: what was asked for, tables, CSV and plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from mpcore.bench.experiment import BenchResult, BenchSettings, check_settings, run_bench
from mpcore.bench.host import host_table, run_host
from mpcore.bench.report import bytes_table, notes, records, time_table, to_csv
from mpcore.bench.shapes import parse
from mpcore.bench.training import TrainSettings, run_training, train_table
from mpcore.cli.json_view import to_json
from mpcore.cli.output import Bars, check_writable, progress_on, show_table
from mpcore.errors import ArgumentError

_SUFFIXES = (".svg", ".png", ".pdf")
_NO_EFFECT: dict[str | None, tuple[str, ...]] = {
    None: (),
    "host": ("shapes", "dtype", "rows", "csv", "plot", "json"),
    "train": ("shapes", "dtype", "backend", "rows", "csv", "plot", "json"),
}


@dataclass(frozen=True)
class BenchOptions:
    """The options as they were typed; see `mpcore bench --help`."""

    shapes: str | None
    rounds: int | None
    threads: int
    device: str
    dtype: str | None
    backend: str | None
    rows: str | None
    quick: bool
    csv: Path | None
    plot: Path | None
    as_json: bool = False

    def settings(self) -> BenchSettings:
        """Returns what to measure.

        Raises:
            ArgumentError: An option is impossible.
        """
        words = self.shapes or ("100K" if self.quick else "gpt2,small")
        return BenchSettings(
            lists=tuple(listed for word in words.split(",") for listed in parse(word)),
            rounds=self.rounds_or(3 if self.quick else 21),
            threads=self.threads,
            device=self.torch_device(),
            dtype=self.dtype or "float16",
            backend=self.backend or "auto",
            rows=None if self.rows is None else tuple(self.rows.split(",")),
        )

    def refuse_what_has_no_effect(self, mode: str | None) -> None:
        """Raises if an option was given that a measurement would not look at.

        Args:
            mode: "host" or "train"; None of the measurement that looks at all of them.

        Raises:
            ArgumentError: One was.
        """
        for name in _NO_EFFECT[mode]:
            given = (self.as_json or None) if name == "json" else getattr(self, name)
            if given is not None:
                raise ArgumentError(
                    f"{name}: expected none with --{mode}, where it has no effect, got {given}."
                )

    def rounds_or(self, default: int) -> int:
        """Returns the rounds asked for, or a default.

        Raises:
            ArgumentError: There are none.
        """
        rounds = default if self.rounds is None else self.rounds
        if rounds < 1:
            raise ArgumentError(f"rounds: expected at least 1, got {rounds}.")
        return rounds

    def torch_device(self) -> torch.device:
        """Returns the device.

        Raises:
            ArgumentError: There is no device of that name.
        """
        try:
            return torch.device(self.device)
        except RuntimeError as error:
            raise ArgumentError(
                f"device: expected cpu or cuda, got {self.device!r}. See torch.device."
            ) from error


def show_bench(options: BenchOptions, console: Console) -> None:
    """Measures steps side by side, prints tables, writes CSV and plot.

    Args:
        options: As typed.
        console: Where to print; with `as_json` JSON goes to standard output instead.

    Raises:
        ArgumentError: An option is impossible; found out before anything runs.
    """
    settings = options.settings()
    if options.csv is not None:
        check_writable(options.csv, "bench.csv", "csv")
    if options.plot is not None:
        check_writable(options.plot, "bench.svg", "plot")
        if options.plot.suffix not in _SUFFIXES:
            raise ArgumentError(
                f"plot: expected a name ending in {', '.join(_SUFFIXES)}, got {options.plot}."
            )
    check_settings(settings)
    with progress_on(Console(stderr=True)) as progress:
        result = run_bench(settings, Bars(progress))
    if options.as_json:
        print(to_json({"machine": result.machine, "rows": records(result)}))
        console = Console(stderr=True)
    else:
        _show_tables(settings, result, console)
    if options.csv is not None:
        options.csv.write_text(to_csv(result), encoding="utf-8")
        _say_written(options.csv, console)
    if options.plot is not None:
        from mpcore.bench.figure import save_figure  # matplotlib, only where it is asked for

        save_figure(result, options.plot)
        _say_written(options.plot, console)


def _show_tables(settings: BenchSettings, result: BenchResult, console: Console) -> None:
    for listed in settings.lists:
        show_table(time_table(result, listed), console)
        show_table(bytes_table(result, listed), console)
    for note in notes(result):
        console.print(Text(note, style="dim"))


def show_host(options: BenchOptions, console: Console) -> None:
    """Measures host time per step and prints it.

    Args:
        options: As typed; see `BenchOptions.refuse_what_has_no_effect`.
        console: Where to print.
    """
    torch.set_num_threads(options.settings().threads)
    rounds = options.rounds_or(5 if options.quick else 51)
    tensors = 40 if options.quick else 1000
    measured = run_host(options.torch_device(), rounds, options.backend or "auto", tensors)
    show_table(host_table(measured, tensors), console)


def show_training(options: BenchOptions, console: Console) -> None:
    """Counts the bytes of whole training steps and prints them.

    Args:
        options: As typed; see `BenchOptions.refuse_what_has_no_effect`.
        console: Where to print.
    """
    torch.set_num_threads(options.settings().threads)
    settings = TrainSettings(
        device=options.torch_device(), rounds=options.rounds_or(3 if options.quick else 21)
    )
    show_table(train_table(run_training(settings), settings), console)


def _say_written(path: Path, console: Console) -> None:
    console.print("Written: ", end="")
    console.print(str(path), style="bold", soft_wrap=True, highlight=False)
