"""Both experiments from end to end: every regime, every seed, one result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from mpcore.base import check_count
from mpcore.demo.data import Corpus, load_corpus
from mpcore.demo.digits import DigitsRun, DigitsSettings, train_digits
from mpcore.demo.model import GPTConfig
from mpcore.demo.processes import Advance, Processes, Work
from mpcore.demo.regimes import DIGITS_REGIMES, FP32, GPT_REGIMES, Regime
from mpcore.demo.train import GPTSettings, Run, train_gpt
from mpcore.errors import ArgumentError

_MOST_PROCESSES = 4  # by default: each keeps PyTorch in memory once more


@dataclass(frozen=True)
class DemoSettings:
    """What `mpcore demo` runs.

    Attributes:
        seeds: Seeds of the GPT runs; every regime runs once with each.
        gpt: Settings of the GPT runs.
        digits: Settings of the digits runs; has seeds of its own.
        threads: CPU threads. Products this small gain little from more than one, and with a fixed
            number the results do not depend on how many cores there are.
        processes: How many runs are computed at the same time; changes no result.
    """

    seeds: tuple[int, ...] = (0,)
    gpt: GPTSettings = field(default_factory=GPTSettings)
    digits: DigitsSettings = field(default_factory=DigitsSettings)
    threads: int = 1
    processes: int = 1


class Progress(Protocol):
    """Hears what the experiments are doing."""

    def begin(self, label: str, total: int) -> Advance:
        """A run of `total` steps begins; what is returned hears how many are over, and a note."""


@dataclass(frozen=True)
class DemoRun:
    """One run of the demo, before it runs.

    Attributes:
        label: What progress calls it.
        regime: How weights are stored and the loss is scaled.
        seed: Of a GPT run; None for the digits, which train several side by side.
        total: Steps or epochs.
    """

    label: str
    regime: Regime
    seed: int | None
    total: int

    def __str__(self) -> str:
        return f"the run {self.label!r}"


@dataclass(frozen=True)
class DemoResult:
    """Everything that the tables and the report show."""

    settings: DemoSettings
    corpus: Corpus
    runs: tuple[Run, ...]
    digits: tuple[DigitsRun, ...]
    seconds: float

    def of(self, regime: Regime) -> list[Run]:
        """The runs of one regime, one per seed."""
        return [run for run in self.runs if run.regime == regime]


def make_settings(
    *,
    quick: bool = False,
    seed: int = 0,
    seeds: int = 1,
    steps: int | None = None,
    threads: int = 1,
    processes: int | None = None,
) -> DemoSettings:
    """Returns the settings that the command line's options describe.

    Args:
        quick: A few steps of everything, to see that it runs; its numbers mean little.
        seed: First seed.
        seeds: How many seeds, counted up from `seed`. The digits always train three.
        steps: Steps of each GPT run; None for the default.
        threads: CPU threads of each process.
        processes: Runs at the same time; None for as many as there are cores for, at most 4. If
            `quick`, None is 1: a process takes as long to start as such runs take.

    Raises:
        ArgumentError: A count is below 1, or the seed is negative.

    Example:
        >>> make_settings(seed=5, seeds=2).seeds
        (5, 6)
    """
    check_count("seeds", seeds)
    check_count("threads", threads)
    if processes is None:
        processes = 1 if quick else max(1, min(_MOST_PROCESSES, _cores() // threads))
    check_count("processes", processes)
    if seed < 0:
        raise ArgumentError(f"seed: expected a whole number of at least 0, got {seed}.")
    settings = DemoSettings(
        seeds=tuple(range(seed, seed + seeds)), threads=threads, processes=processes
    )
    gpt = settings.gpt
    digits = replace(settings.digits, seeds=tuple(range(seed, seed + 3)))
    if quick:
        config = GPTConfig(gpt.config.vocabulary, context=32, width=32, heads=2, layers=2)
        gpt = replace(gpt, steps=40, warmup=5, config=config, validation_windows=32)
        digits = replace(digits, epochs=2)
    if steps is not None:
        check_count("steps", steps)
        gpt = replace(gpt, steps=steps, warmup=min(gpt.warmup, max(1, steps // 10)))
    return replace(settings, gpt=gpt, digits=digits)


def run_demo(settings: DemoSettings, progress: Progress) -> DemoResult:
    """Runs both experiments on the CPU, FP32 first; minutes with the default settings.

    Args:
        settings: What to run.
        progress: Told what is going on.

    Raises:
        ArgumentError: This Python has no standard library to read.
        StageError: A process of several ended, or what ran in it raised.
    """
    started = time.perf_counter()
    corpus = load_corpus()
    planned = planned_runs(settings)
    results: list[Run | DigitsRun]
    if settings.processes == 1:
        with cpu_threads(settings.threads):
            results = [
                run_one(settings, corpus, run, progress.begin(run.label, run.total))
                for run in planned
            ]
    else:
        processes = Processes(partial(_prepare, settings), settings.processes)
        results = processes.run(planned, lambda run: progress.begin(run.label, run.total))
    return DemoResult(
        settings,
        corpus,
        tuple(result for result in results if isinstance(result, Run)),
        tuple(result for result in results if isinstance(result, DigitsRun)),
        time.perf_counter() - started,
    )


def planned_runs(settings: DemoSettings) -> list[DemoRun]:
    """Lists all runs: those of the GPT, which take longest, and then the digits.

    Example:
        >>> [run.label for run in planned_runs(make_settings())][0]
        'GPT: FP32'
    """
    gpt = [
        DemoRun(
            f"GPT: {regime.label}" + (f" (seed {seed})" if len(settings.seeds) > 1 else ""),
            regime,
            seed,
            settings.gpt.steps,
        )
        for seed in settings.seeds
        for regime in GPT_REGIMES
    ]
    epochs = settings.digits.epochs
    return gpt + [DemoRun(f"Digits: {r.label}", r, None, epochs) for r in DIGITS_REGIMES]


def run_one(
    settings: DemoSettings, corpus: Corpus, run: DemoRun, advance: Advance
) -> Run | DigitsRun:
    """Does one run, on as many threads as PyTorch is set to."""
    if run.seed is None:
        return train_digits(run.regime, settings.digits, lambda done: advance(done, ""))
    return train_gpt(
        run.regime,
        settings.gpt,
        corpus,
        run.seed,
        lambda done, loss: advance(done, f"loss {loss:.3f}"),
    )


def _prepare(settings: DemoSettings) -> Work[DemoRun, Run | DigitsRun]:
    """What a process of several does before its first run."""
    torch.set_num_threads(settings.threads)
    return partial(run_one, settings, load_corpus())


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Computes on so many CPU threads for a while.

    Example:
        >>> with cpu_threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_to_fp32(result: DemoResult, regime: Regime) -> float:
    """The mean validation loss of a regime over that of FP32, minus 1.

    Returns:
        0.01 for 1 % above FP32.
    """
    losses = mean([run.validation_loss for run in result.of(regime)])
    return losses / mean([run.validation_loss for run in result.of(FP32)]) - 1


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    return sum(values) / len(values)


def _cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
