"""The commands: `mpcore demo`, `mpcore bench` and `mpcore doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import mpcore
from mpcore.cli.doctor_view import show_diagnosis
from mpcore.doctor import diagnose
from mpcore.errors import ArgumentError, MpcoreError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="16-bit training with FP32 masters and loss scaling.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(mpcore.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """16-bit training with FP32 masters and loss scaling."""


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of everything: does it run at all?")
    ] = False,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="Seeds of the GPT runs; tables show means.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps of each GPT run.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    output: Annotated[Path, typer.Option(help="Where to write the report.")] = Path(
        "mpcore-demo.html"
    ),
) -> None:
    """Train a small GPT in FP32 and in 16 bits; print tables, write an HTML report."""
    with _errors_in_one_line():
        # here, because the imports take seconds that `doctor` and `--help` need not wait for
        from mpcore.cli.demo_view import run_and_show
        from mpcore.demo.experiment import make_settings

        settings = make_settings(quick=quick, seed=seed, seeds=seeds, steps=steps, threads=threads)
        run_and_show(settings, output, Console())


@app.command()
def bench(
    shapes: Annotated[
        str | None,
        typer.Option(help="gpt2, small, sweep, or numbers of parameters such as 10M; commas."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed steps of each row.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float16 or bfloat16, of the weights that have masters.")
    ] = "float16",
    backend: Annotated[str, typer.Option(help="Of the mpcore rows.")] = "auto",
    rows: Annotated[str | None, typer.Option(help="Which rows; commas.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small and short: does it run at all?")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the numbers as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .svg, .png or .pdf.")] = None,
    host: Annotated[
        bool, typer.Option("--host", help="Host time per step, kernels left out, instead.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Bytes of whole training steps instead.")
    ] = False,
) -> None:
    """Time the optimizer step beside torch's and other libraries', results checked first."""
    with _errors_in_one_line():
        from mpcore.cli.bench_view import BenchOptions, show_bench, show_host, show_training

        options = BenchOptions(
            shapes, rounds, threads, device, dtype, backend, rows, quick, csv, plot
        )
        if host and train:
            raise ArgumentError("host: expected one of --host and --train, got both.")
        show = show_host if host else show_training if train else show_bench
        show(options, Console())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show what this machine can do, which 16-bit format suits it and which backend will run."""
    with _errors_in_one_line():
        diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(diagnosis), indent=2))
    else:
        show_diagnosis(diagnosis, Console())


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Ends the program with status 2 and the message of a user's error, without a traceback."""
    try:
        yield
    except MpcoreError as error:
        typer.echo(f"mpcore: {error}", err=True)
        raise typer.Exit(2) from error
