"""Both experiments from end to end: every regime, every seed, one result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from mpcore._checks import check_count
from mpcore.demo.data import Corpus, load_corpus
from mpcore.demo.digits import DigitsRun, DigitsSettings, train_digits
from mpcore.demo.model import GPTConfig
from mpcore.demo.regimes import DIGITS_REGIMES, FP32, GPT_REGIMES, Regime
from mpcore.demo.train import GPTSettings, Run, train_gpt
from mpcore.errors import ArgumentError


@dataclass(frozen=True)
class DemoSettings:
    """What `mpcore demo` runs.

    Attributes:
        seeds: Seeds of the GPT runs; every regime runs once with each.
        gpt: Settings of the GPT runs.
        digits: Settings of the digits runs; has seeds of its own.
        threads: CPU threads. Products this small gain little from more than one, and with a fixed
            number the results do not depend on how many cores there are.
    """

    seeds: tuple[int, ...] = (0,)
    gpt: GPTSettings = field(default_factory=GPTSettings)
    digits: DigitsSettings = field(default_factory=DigitsSettings)
    threads: int = 1


class Progress(Protocol):
    """Hears what the experiments are doing."""

    def begin(self, label: str, total: int) -> None:
        """A run of `total` steps begins."""

    def advance(self, done: int, note: str) -> None:
        """`done` steps of the current run are over."""


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
) -> DemoSettings:
    """Returns the settings that the command line's options describe.

    Args:
        quick: A few steps of everything, to see that it runs; its numbers mean little.
        seed: First seed.
        seeds: How many seeds, counted up from `seed`. The digits always train three.
        steps: Steps of each GPT run; None for the default.
        threads: CPU threads.

    Raises:
        ArgumentError: A count is below 1, or the seed is negative.

    Example:
        >>> make_settings(seed=5, seeds=2).seeds
        (5, 6)
    """
    check_count("seeds", seeds)
    check_count("threads", threads)
    if seed < 0:
        raise ArgumentError(f"seed: expected a whole number of at least 0, got {seed}.")
    settings = DemoSettings(seeds=tuple(range(seed, seed + seeds)), threads=threads)
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
    """
    started = time.perf_counter()
    corpus = load_corpus()
    with cpu_threads(settings.threads):
        runs = [
            _run_gpt(regime, settings, corpus, seed, progress)
            for seed in settings.seeds
            for regime in GPT_REGIMES
        ]
        digits = [_run_digits(regime, settings, progress) for regime in DIGITS_REGIMES]
    return DemoResult(settings, corpus, tuple(runs), tuple(digits), time.perf_counter() - started)


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


def _run_gpt(
    regime: Regime, settings: DemoSettings, corpus: Corpus, seed: int, progress: Progress
) -> Run:
    many = f" (seed {seed})" if len(settings.seeds) > 1 else ""
    progress.begin(f"GPT: {regime.label}{many}", settings.gpt.steps)
    return train_gpt(
        regime,
        settings.gpt,
        corpus,
        seed,
        lambda done, loss: progress.advance(done, f"loss {loss:.3f}"),
    )


def _run_digits(regime: Regime, settings: DemoSettings, progress: Progress) -> DigitsRun:
    progress.begin(f"Digits: {regime.label}", settings.digits.epochs)
    return train_digits(regime, settings.digits, lambda done: progress.advance(done, ""))
