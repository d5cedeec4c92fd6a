"""FP32 masters against 16-bit weights that are updated themselves, on the digits, with Adam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mpcore.base import Table
from mpcore.comparison.result import mean_and_spread
from mpcore.demo.digits import DigitsRun, DigitsSettings, train_digits
from mpcore.demo.regimes import DIGITS_REGIMES
from mpcore.demo.tables import small

RATES = (1e-4, 3e-5)
SETTINGS = DigitsSettings(seeds=(0, 1, 2, 3, 4), epochs=60, batch=64)


def measure(
    settings: DigitsSettings, on_run: Callable[[str, int], Callable[[int], None]]
) -> dict[float, list[DigitsRun]]:
    """Trains every regime at two learning rates.

    Args:
        settings: Seeds and epochs.
        on_run: Hears the name of a run and its epochs; returns what hears of each epoch.

    Returns:
        By learning rate the runs, in the order of the regimes.
    """
    found = {}
    for rate in RATES:
        own = replace(settings, adamw=replace(settings.adamw, lr=rate))
        found[rate] = [
            train_digits(regime, own, on_run(f"lr {small(rate)}: {regime.label}", own.epochs))
            for regime in DIGITS_REGIMES
        ]
    return found


def table(found: dict[float, list[DigitsRun]], settings: DigitsSettings) -> Table:
    """Returns accuracies and lost updates, one row for each regime."""
    rows = []
    for runs in zip(*found.values(), strict=True):
        cells = [runs[0].regime.label]
        for run in runs:
            accuracy = mean_and_spread([100 * value for value in run.accuracies])
            cells += [accuracy, f"{run.lost_updates:.0%}"]
        rows.append(tuple(cells))
    header = ["Regime"]
    for rate in found:
        header += [f"lr {small(rate)}: accuracy %", "lost"]
    return Table(
        title="Masters rescue what small updates teach",
        header=tuple(header),
        rows=tuple(rows),
        notes=(
            f"A 64-128-64-10 ReLU network, Adam, {settings.epochs} epochs of {settings.batch} "
            f"images a step, {len(settings.seeds)} seeds: mean and standard deviation. Lost: share "
            "of the non-zero updates that left the stored value as it was.",
        ),
    )
