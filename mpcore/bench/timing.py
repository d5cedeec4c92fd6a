"""Times of steps, taken in rounds so that whatever slows the machine slows every row."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mpcore.bench.contenders import Contender
from mpcore.bench.problem import Problem
from mpcore.bench.tensors import synchronize


@dataclass(frozen=True)
class Times:
    """Seconds of one row, in the order of the rounds.

    Example:
        >>> Times((4.0, 1.0, 2.0, 3.0, 5.0)).quartiles
        (2.0, 3.0, 4.0)
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower quartile, the median, the upper quartile."""
        if len(self.seconds) == 1:
            return (self.median,) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high


def time_rounds(
    problem: Problem,
    contenders: Mapping[str, Contender],
    rounds: int,
    on_round: Callable[[int], None],
) -> dict[str, Times]:
    """Times one step of every row in each round, starting with another row each time.

    Gradients are filled anew before each step, untimed: steps that unscale in place would otherwise
    meet gradients that shrink from step to step. The garbage collector waits.

    Args:
        problem: What is stepped over.
        contenders: Rows that have stepped before, which warmed them up.
        rounds: At least 1.
        on_round: Called with the number of rounds done.
    """
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    keys = list(contenders)
    for number in range(rounds):
        first = number % len(keys) if keys else 0
        for key in keys[first:] + keys[:first]:
            contender = contenders[key]
            contender.before_step()
            problem.fill(contender.grads, 0, scaled=contender.scaled)
            seconds[key].append(time_call(contender.step, problem.device))
        on_round(number + 1)
    return {key: Times(tuple(values)) for key, values in seconds.items()}


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of a call: CUDA events on a GPU, the wall clock on a CPU.

    Example:
        >>> time_call(lambda: None, torch.device("cpu")) >= 0
        True
    """
    synchronize(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            synchronize(device)
            return float(begin.elapsed_time(end)) / 1e3
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()


def copy_bandwidth(device: torch.device, count: int = 2**26) -> float:
    """Measures bytes per second of a copy, read and written bytes counted: the best of ten.

    Args:
        device: Where.
        count: float32 elements; 256 MiB, far beyond any cache.

    Example:
        >>> copy_bandwidth(torch.device("cpu"), 1000) > 0
        True
    """
    source = torch.ones(count, device=device)
    target = torch.zeros_like(source)
    best = min(time_call(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * 4 * count / best
