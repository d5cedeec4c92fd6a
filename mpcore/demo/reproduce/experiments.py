"""The four experiments by name, with their settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mpcore.base import Table, check_count
from mpcore.demo.digits import DigitsSettings
from mpcore.demo.experiment import Progress, cpu_threads
from mpcore.demo.reproduce import loss_scaling, lost_gradients, lost_updates, master_weights
from mpcore.errors import ArgumentError

NAMES = ("loss-scaling", "master-weights", "lost-gradients", "lost-updates")


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the experiments that names stand for, all without one.

    Raises:
        ArgumentError: There is none of that name.

    Example:
        >>> chosen(["lost-updates"]), chosen([])[0]
        (('lost-updates',), 'loss-scaling')
    """
    for name in names:
        if name not in NAMES:
            raise ArgumentError(f"names: expected some of {', '.join(NAMES)}, got {name!r}.")
    return tuple(dict.fromkeys(names)) or NAMES


def reproduce(
    name: str, *, seeds: int, quick: bool, threads: int, progress: Progress
) -> tuple[Table, ...]:
    """Runs one experiment on the CPU and returns its tables.

    Args:
        name: One of `NAMES`.
        seeds: How many, from 0; trained side by side.
        quick: One epoch each, to see that it runs; its numbers mean little.
        threads: CPU threads.
        progress: Told what is going on.

    Raises:
        ArgumentError: A count is below 1.
    """
    check_count("seeds", seeds)
    check_count("threads", threads)

    def own(settings: DigitsSettings) -> DigitsSettings:
        epochs = 1 if quick else settings.epochs
        return replace(settings, seeds=tuple(range(seeds)), epochs=epochs)

    def on_run(label: str, epochs: int) -> Callable[[int], None]:
        advance = progress.begin(label, epochs)
        return lambda done: advance(done, "")

    with cpu_threads(threads):
        if name == "loss-scaling":
            settings = own(loss_scaling.SETTINGS)
            return (loss_scaling.table(loss_scaling.measure(settings, on_run), settings),)
        if name == "master-weights":
            settings = own(master_weights.SETTINGS)
            return (master_weights.table(master_weights.measure(settings, on_run), settings),)
        if name == "lost-gradients":
            settings = own(lost_gradients.SETTINGS)
            return lost_gradients.tables(lost_gradients.measure(settings, on_run), settings)
        on_run("Updates of 2^-13 to 2^-7", 1)(0)
        return lost_updates.tables(lost_updates.measure())
