"""Long runs: second moments in bfloat16 that are rounded to nearest stand still, ours do not.

Bounds are 5 standard deviations of the mean of so many roundings: see
`tests/test_moments_that_move.py`, which says the same of the backends alone.
"""

import math

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.engines import Engine

COMPILED = Engine("compiled", "fused")
SHAPE = (16, 256)
COUNT = 16 * 256
STEPS = 600
BETA = 0.999


def trained(inner, weight, grad, steps, **kept):
    optimizer = COMPILED.wrap(inner, mpcore.NoLossScale(), **kept)
    for step in range(steps):
        weight.grad = torch.full_like(weight, grad)
        optimizer.step()
        if step == 0 and "exp_avg_sq" in optimizer.state[weight]:
            optimizer.set_float32_state(weight, {"exp_avg_sq": torch.ones(SHAPE)})
    return optimizer


def nearest(value, target, steps):
    """The same average in bfloat16, rounded to nearest at each step by torch."""
    average = torch.tensor(value).bfloat16()
    for _ in range(steps):
        average = (average.float() * BETA + target * (1 - BETA)).bfloat16()
    return average.item()


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("masters", ["split", "none"])
def test_second_moments_decay_as_they_should(masters, moments):
    weight = nn.Parameter(torch.ones(SHAPE).bfloat16())
    inner = torch.optim.AdamW([weight], lr=1e-6, betas=(0.9, BETA), weight_decay=0.0)
    optimizer = trained(inner, weight, 0.5, STEPS + 1, masters=masters, moments=moments)
    found = optimizer.float32_state(weight)["exp_avg_sq"].double()
    expected = 0.25 + 0.75 * BETA**STEPS
    # all numbers of a block are its largest one, which 8 bits have exactly, but for roots
    apart = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 2.0**-22}[moments]
    left = sum(BETA ** (2 * k) for k in range(STEPS))
    bound = 5 * apart / 2 * math.sqrt(left / COUNT) + STEPS * 2.0**-23
    assert abs(float(found.mean()) - expected) < bound
    assert nearest(1.0, 0.25, STEPS) == 1.0  # which is 0.34 away
    assert abs(1.0 - expected) > 100 * bound


def test_weights_without_masters_move_where_rounded_ones_stand_still():
    update = 2.0**-12  # a 32nd of the distance to the neighbour of 1
    weight = nn.Parameter(torch.ones(SHAPE).bfloat16())
    sgd = torch.optim.SGD([weight], lr=update)
    trained(sgd, weight, -1.0, STEPS, masters="none")
    assert (torch.ones(()).bfloat16() + update).item() == 1.0
    expected, apart = 1 + STEPS * update, 2.0**-7
    chance = 5 * math.sqrt(STEPS * update * apart / COUNT)
    found = float(weight.detach().double().mean())
    assert abs(found - expected) < chance
    assert expected - 1 > 10 * chance
