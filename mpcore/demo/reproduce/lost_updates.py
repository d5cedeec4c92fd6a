"""Which updates rounding to 16 bits loses: a law with two limits, measured.

A weight w in [2^e, 2^(e+1)) has neighbours at a distance of one unit of its last place, 2^(e-10) in
float16 and 2^(e-7) in bfloat16. Rounding to nearest drops an update below half of that. As a share
of w that is between 2^-12 and 2^-11 in float16, between 2^-9 and 2^-8 in bfloat16: below the first
limit every update is lost, above the second none is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mpcore.base import Table
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.loss_scale import NoLossScale
from mpcore.precision import cast_model

SHARES = tuple(range(-13, -6))
FORMATS = (torch.float16, torch.bfloat16)
COUNT, STEPS, STEP = 200_000, 10_000, 1e-4


@dataclass(frozen=True)
class LostUpdates:
    """What was measured.

    Attributes:
        lost: By format, and by exponent k of the relative update 2^k: share of weights that stayed.
        sums: By name, what 1 has become after adding 1e-4 ten thousand times.
    """

    lost: dict[torch.dtype, dict[int, float]]
    sums: dict[str, float]


def lost_share(dtype: torch.dtype, exponent: int, seed: int, count: int = COUNT) -> float:
    """Returns which share of updates by 2^exponent of a weight leaves the 16-bit weight as it was.

    Weights are drawn evenly from [1, 2) and rounded; the update is added in float64 and rounded to
    nearest.

    Args:
        dtype: float16 or bfloat16.
        exponent: Of the relative update.
        seed: Of the weights.
        count: How many.

    Example:
        >>> lost_share(torch.float16, -12, seed=0), lost_share(torch.bfloat16, -7, seed=0)
        (1.0, 0.0)
    """
    generator = torch.Generator().manual_seed(seed)
    weights = (1 + torch.rand(count, dtype=torch.float64, generator=generator)).to(dtype)
    moved = (weights.double() * (1 + 2.0**exponent)).to(dtype)
    return float((moved == weights).double().mean())


def measure(seed: int = 0) -> LostUpdates:
    """Measures the law, and what it does to a sum of small steps.

    Args:
        seed: Of the weights.
    """
    lost = {dtype: {k: lost_share(dtype, k, seed) for k in SHARES} for dtype in FORMATS}
    sums = {
        "float32": _plain_sum(torch.float32),
        "float16": _plain_sum(torch.float16),
        "bfloat16": _plain_sum(torch.bfloat16),
        "float16 with a master": _master_sum(torch.float16),
        "bfloat16 with a master": _master_sum(torch.bfloat16),
    }
    return LostUpdates(lost, sums)


def _plain_sum(dtype: torch.dtype) -> float:
    weight = torch.ones((), dtype=dtype)
    for _ in range(STEPS):
        weight += STEP
    return float(weight)


def _master_sum(dtype: torch.dtype) -> float:
    """Steps an optimizer whose gradient is -1 at a learning rate of 1e-4."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=STEP), NoLossScale())
    model = cast_model(model, dtype, optimizer)
    for _ in range(STEPS):
        model.weight.grad = -torch.ones_like(model.weight)
        optimizer.step()
    return float(model.weight.detach())


def tables(found: LostUpdates) -> tuple[Table, ...]:
    """Returns the law and the sums."""
    law = Table(
        title="Updates that rounding loses, by their size against the weight",
        header=("Format", *(f"2^{k}" for k in SHARES)),
        rows=tuple(
            (
                str(dtype).removeprefix("torch."),
                *(f"{100 * share:.4g}%" for share in found.lost[dtype].values()),
            )
            for dtype in FORMATS
        ),
        notes=(
            f"{COUNT:,} weights drawn evenly from [1, 2). The law: all are lost up to 2^-12 of the "
            "weight in float16 and 2^-9 in bfloat16, none above 2^-11 and 2^-8.",
        ),
    )
    sums = Table(
        title=f"1, after adding {STEP:g} to it {STEPS:,} times",
        header=("Weight", "Sum"),
        rows=tuple((name, f"{value:.6g}") for name, value in found.sums.items()),
        notes=(
            "Exactly it would be 2. With a master: SGD at a learning rate of 1e-4, each gradient "
            "-1; the weight is the rounded master.",
        ),
    )
    return law, sums
