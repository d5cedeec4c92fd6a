"""What rounding does to averages and weights that move by less than half a place at each step.

A mean of n elements that are rounded at random is off by chance: a rounding between neighbours d
apart has a variance of at most d^2 / 4, of which a step later beta^2 is left. Bounds are 5 standard
deviations of that sum, and what float32 rounds off. Only the compiled backend is asked: it has the
bits of the reference, see `tests/test_stored_updates.py`.
"""

import math

import numpy as np
import pytest
import torch
from mpcore.backends import compiled
from mpcore.stores import MOMENT_STORES

from mpcore_testing.batches import BRAIN, FULL, Batch
from mpcore_testing.fused import Stepping
from mpcore_testing.stores import kept

ROWS, ROW = 16, 256
COUNT = ROWS * ROW
STEPS = 300
BETA = 0.999


def adam(betas, lr=0.0):
    return (lr, *betas, 1e-8, 0.0, 1.0, 0.0)


def stepping(moments, first, second):
    """Adam over weights that stand still, and moments as they are given."""
    zeros = torch.zeros(ROWS, ROW)
    batch = Batch([zeros.clone()], [zeros.to(BRAIN)], [[first], [second]], [torch.tensor(0.0)], [0])
    return Stepping(compiled, "adam", kept(batch, moments=moments))


def float64_of(batch, k):
    scales = batch.scales[k][0] if batch.scales and batch.scales[k] else None
    return (
        MOMENT_STORES[batch.moment_stores[k]].decode(batch.moments[k][0], scales).double().numpy()
    )


def decayed(start, target, beta, steps=STEPS):
    return target + (start - target) * beta**steps


def bound(apart, beta, steps=STEPS, count=COUNT):
    """5 standard deviations of the mean of so many elements."""
    kept_of_it = sum(beta ** (2 * k) for k in range(steps))
    return 5 * apart / 2 * math.sqrt(kept_of_it / count) + steps * 2.0**-23


def nearest(start, target, beta, dtype):
    """The same average rounded to nearest at each step, by torch's cast."""
    average = torch.tensor(start, dtype=dtype)
    for _ in range(STEPS):
        average = (average.float() * beta + target * (1 - beta)).to(dtype)
    return average.item()


@pytest.mark.parametrize(("start", "target"), [(1.0, 0.25), (0.25, 0.375), (0.75, 0.0)])
def test_bfloat16_second_moments_move_where_nearest_ones_stand(start, target):
    assert nearest(start, target, BETA, BRAIN) == start
    ours = stepping("bfloat16", torch.zeros(ROWS, ROW), torch.full((ROWS, ROW), start))
    grads = [torch.full((ROWS, ROW), math.sqrt(target))]
    for _ in range(STEPS):
        ours.step(grads, adam((0.9, BETA)), coefficient=1.0)
    got = float64_of(ours.batch, 1)
    apart = 2.0**-8  # of numbers from 0.5 to 1; smaller ones are closer
    expected = decayed(start, target, BETA)
    error = abs(got.mean() - expected)
    assert error < bound(apart, BETA)
    assert abs(expected - start) > 10 * bound(apart, BETA)
    # no element is further off than chance has it: 6 of its own standard deviations
    assert np.abs(got - expected).max() < 6 / 5 * bound(apart, BETA, count=1)


def test_bfloat16_first_moments_keep_the_mean_of_a_slow_average():
    beta = 0.99
    ours = stepping("bfloat16", torch.full((ROWS, ROW), -1.0), torch.ones(ROWS, ROW))
    grads = [torch.full((ROWS, ROW), -0.875)]
    for _ in range(STEPS):
        ours.step(grads, adam((beta, BETA)), coefficient=1.0)
    assert nearest(-1.0, -0.875, beta, BRAIN) == -1.0
    error = abs(float64_of(ours.batch, 0).mean() - decayed(-1.0, -0.875, beta))
    assert error < bound(2.0**-8, beta)


def test_8_bit_moments_keep_the_mean_of_a_slow_average():
    # the largest of each block stands still; the others move from 1 / 9 to 1 / 4 of it
    first, second = torch.full((ROWS, ROW), -1 / 9), torch.full((ROWS, ROW), 1 / 9)
    grad = torch.full((ROWS, ROW), -0.25)
    squares = torch.full((ROWS, ROW), 0.5)
    for moment, sign in ((first, -1.0), (second, 1.0)):
        moment[:, 0] = sign
    grad[:, 0] = squares[:, 0] = 1.0
    for k, (beta, most, grads, target) in enumerate(
        [(0.99, 127, -grad.abs(), -0.25), (BETA, 255, squares, 0.25)]
    ):
        ours = stepping("int8", first.clone(), second.clone())
        for _ in range(STEPS):
            ours.step([grads], adam((0.99, BETA)), coefficient=1.0)
        got = float64_of(ours.batch, k)
        start = float64_of(stepping("int8", first, second).batch, k)[0, 1]
        expected = decayed(start, target, beta)
        apart = (2 * most * 0.5 + 1) / most**2  # of codes at 1 / 4
        # a part of 65536 is half a part off at most, at each step
        parts = apart * 2.0**-17 * min(STEPS, 1 / (1 - beta))
        others = got[:, 1:]
        assert abs(others.mean() - expected) < bound(apart, beta, count=others.size) + parts
        assert np.allclose(np.abs(got[:, 0]), 1.0, rtol=2.0**-12, atol=0)


@pytest.mark.parametrize("parts", [0.001, 0.1, 0.49])
def test_weights_without_masters_move_at_the_rate_of_their_updates(parts):
    # a step of SGD by so many parts of the distance to the neighbour, from 1 upwards
    apart, steps = 2.0**-7, 400
    update = parts * apart
    start = torch.ones(ROWS, ROW)
    batch = Batch([start.clone()], [start.to(BRAIN)], [], [torch.tensor(0.0)], [0])
    ours = Stepping(compiled, "sgd", kept(batch, store="none"))
    grads = [torch.full((ROWS, ROW), -1.0, dtype=FULL)]
    for _ in range(steps):
        ours.step(grads, (update, 0.0, 0.0, 0.0, 0.0, 0.0), coefficient=1.0)
    got = ours.batch.masters[0].double().numpy()
    expected = 1 + steps * update
    # once it is above 2, neighbours are twice as far apart
    apart *= 2 if expected > 1.9 else 1
    chance = 5 * math.sqrt(steps * min(parts * apart**2, apart**2 / 4) / COUNT)
    assert abs(got.mean() - expected) < chance + steps * 2.0**-23
    assert expected - 1 > 5 * chance  # which a weight that stands still does not meet
    # to nearest none of them moves
    assert (start.to(BRAIN) + update).to(BRAIN).eq(1).all()
