"""Right before fast: every row's weights after three steps against float64."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mpcore.bench.contenders import Contender
from mpcore.bench.problem import ADAMW, FACTORS, Problem, oracle
from mpcore.bench.rows import Bound

CHECKED_STEPS = len(FACTORS)


def checked_step(contender: Contender, problem: Problem, step: int) -> None:
    """Fills the gradients of a checked step and takes it."""
    contender.before_step()
    problem.fill(contender.grads, step, scaled=contender.scaled)
    contender.step()


def errors(problem: Problem, contenders: Mapping[str, tuple[Contender, Bound]]) -> dict[str, float]:
    """Returns how far each row is from float64, in units of its bound; syncs with the host.

    Args:
        problem: What was stepped over; the oracle is computed once, tensor by tensor.
        contenders: Rows that took all checked steps, with their bounds.

    Returns:
        By key: at most 1 if the row is right; infinite if a weight is not finite.
    """
    worst = dict.fromkeys(contenders, 0.0)
    for index, expected in enumerate(oracle(problem)):
        for key, (contender, bound) in contenders.items():
            found = distance(contender.weight(index), expected, bound)
            share = expected.numel() / problem.listed.count
            worst[key] = max(worst[key], found) if bound.largest else worst[key] + found * share
    return worst


def distance(weight: Tensor, expected: Tensor, bound: Bound) -> float:
    """Returns the error of a weight in units of the bound: its largest or its mean.

    Args:
        weight: As a row left it.
        expected: float64, same shape.
        bound: How it is judged.

    Example:
        >>> import torch
        >>> bound = Bound(0.5, 0.0, True, "an example")
        >>> distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]).double(), bound)
        1.0
    """
    allowed = bound.relative * expected.abs() + bound.in_steps * ADAMW["lr"]
    off = (weight.double() - expected).abs() / allowed
    off = off.nan_to_num(nan=float("inf"))
    return float(off.max() if bound.largest else off.mean())


def verdict(error: float, bound: Bound) -> str | None:
    """Returns why a row is wrong, or None if it is right.

    Example:
        >>> verdict(0.5, Bound(0.1, 0.0, True, "an example")) is None
        True
    """
    if error <= 1:
        return None
    return f"wrong weights: {error:.3g} times the bound ({bound})"
