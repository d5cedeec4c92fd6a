"""The commands: what the `mpcore` program can do, and its options."""

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
from mpcore.cli.user_code import UserCodeError
from mpcore.doctor import diagnose
from mpcore.errors import ArgumentError, MpcoreError

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]

app = typer.Typer(
    no_args_is_help=True,
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
    threads: Annotated[int, typer.Option(help="CPU threads of each process.")] = 1,
    processes: Annotated[
        int | None,
        typer.Option(help="Runs at the same time.", show_default="the cores, at most 4"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the report.")] = Path(
        "mpcore-demo.html"
    ),
) -> None:
    """Train a small GPT in FP32 and in 16 bits; print tables, write an HTML report."""
    with _errors_in_one_line():
        # here, because the imports take seconds that `doctor` and `--help` need not wait for
        from mpcore.cli.demo_view import run_and_show
        from mpcore.demo.experiment import make_settings

        settings = make_settings(
            quick=quick, seed=seed, seeds=seeds, steps=steps, threads=threads, processes=processes
        )
        run_and_show(settings, output, Console())


@app.command()
def bench(
    shapes: Annotated[
        str | None,
        typer.Option(help="gpt2, small, sweep, host, watch, numbers such as 10M; commas."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed steps of each row.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16 or bfloat16, of the weights that have masters.", show_default="float16"
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Of the mpcore rows.", show_default="auto")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Which rows; commas.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Does it run at all?")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the numbers as CSV.")] = None,
    as_json: _Json = False,
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
            shapes=shapes,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype=dtype,
            backend=backend,
            rows=rows,
            quick=quick,
            csv=csv,
            plot=plot,
            as_json=as_json,
        )
        options.refuse_what_has_no_effect(_mode(host, train))
        show = show_host if host else show_training if train else show_bench
        show(options, Console())


def _mode(host: bool, train: bool) -> str | None:
    """Returns which of `--host` and `--train` was given; raises if both were."""
    if host and train:
        raise ArgumentError("host: expected one of --host and --train, got both.")
    return "host" if host else "train" if train else None


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="loss-scaling, master-weights, lost-gradients, lost-updates; all without one."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many, trained side by side.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch each: does it run at all?")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Reproduce what is known of 16-bit training on handwritten digits, in minutes."""
    with _errors_in_one_line():
        from mpcore.cli.reproduce_view import reproduce_and_show

        reproduce_and_show(
            names or [],
            seeds=seeds,
            quick=quick,
            threads=threads,
            output=output,
            console=Console(),
        )


@app.command(name="compare")
def compare_command(
    target: Annotated[
        str, typer.Argument(help="The training loop: file.py:function or package.module:function.")
    ],
    policies: Annotated[str, typer.Option(help="Beside float32; commas.")] = "float16,bfloat16",
    seeds: Annotated[int, typer.Option(help="How many; five tell much more than two.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    metric: Annotated[str, typer.Option(help="What to call what the loop returns.")] = "loss",
    higher_is_better: Annotated[
        bool, typer.Option("--higher-is-better", help="Of the metric, accuracy for example.")
    ] = False,
    margin: Annotated[
        float, typer.Option(help="Share of FP32's metric that does not matter.")
    ] = 0.01,
    output: Annotated[Path, typer.Option(help="Where to write the report.")] = Path(
        "mpcore-compare.html"
    ),
    as_json: _Json = False,
) -> None:
    """Train your own loop in FP32 and in 16 bits with the same seeds: do they agree?"""
    with _errors_in_one_line():
        from mpcore.cli.compare_view import CompareOptions, compare_and_show

        options = CompareOptions(
            policies=policies,
            seeds=seeds,
            first_seed=first_seed,
            metric=metric,
            higher_is_better=higher_is_better,
            margin=margin,
            output=output,
            as_json=as_json,
        )
        compare_and_show(target, options, Console())


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Files that mpcore.JsonLines wrote, one of each run.")
    ],
    output: Annotated[Path, typer.Option(help="Where to write the report.")] = Path(
        "mpcore-report.html"
    ),
    title: Annotated[str, typer.Option(help="Of the report.")] = "What the monitor saw",
    as_json: _Json = False,
    join: Annotated[
        bool, typer.Option("--join", help="The files are parts of one run, in order.")
    ] = False,
) -> None:
    """Turn what a monitor wrote into one HTML file: losses, scales, skips, gradients, layers."""
    with _errors_in_one_line():
        from mpcore.cli.report_view import write_report

        write_report(runs, output, title, None if as_json else Console(), join=join)


@app.command()
def memory(
    size: Annotated[str, typer.Argument(help="Parameters of the model: 124M, 7G, gpt2.")] = "gpt2",
    ranks: Annotated[int, typer.Option(help="Ranks that FSDP2 shards it over.")] = 1,
    moments: Annotated[
        int, typer.Option(help="Of the optimizer: 2 for AdamW, 1 for Lion, 0 for SGD.")
    ] = 2,
    as_json: _Json = False,
) -> None:
    """Print what a model's weights, gradients, masters and moments take, by how they are kept."""
    with _errors_in_one_line():
        from mpcore.cli.memory_view import show_memory

        console = None if as_json else Console()
        show_memory(size, ranks=ranks, moments=moments, console=console)


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Show what this machine can do, which 16-bit format suits it and which backend will run."""
    with _errors_in_one_line():
        diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(diagnosis), indent=2))
    else:
        show_diagnosis(diagnosis, Console())


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Ends the program with a user's error: status 2, and no traceback but that of their own code.

    An interrupted one ends with status 130, as shells have it.
    """
    try:
        yield
    except MpcoreError as error:
        typer.echo(f"mpcore: {error}", err=True)
        raise typer.Exit(2) from error
    except UserCodeError as error:
        typer.echo(f"{error.lines}\nmpcore: {error}".lstrip(), err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
