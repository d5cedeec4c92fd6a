"""update_ against NumPy, bit for bit: every rule, dtype and option."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcore_testing.batches import (
    COMBINATIONS,
    FULL,
    HALF,
    KINDS,
    OPTIONS,
    Batch,
    Hyper,
    make_batch,
    make_grads,
)
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import random_bits
from mpcore_testing.strategies import float32_bits

SIZES = [0, 1, 7, 300]


def named(values):
    return "-".join(map(str, values[:2]))


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), COMBINATIONS)
def test_several_steps_give_the_bits_of_numpy(options, grad, weight, device):
    rule, moments, numbers = options
    batch = make_batch(moments, weight, SIZES, steps=0.0)
    twin = Twin(rule, [batch], device)
    for step in range(3):
        twin.step([make_grads(batch, grad, 50 * step)], Hyper.of(numbers))
    assert [step.item() for step in twin.actual[0].steps] == [3.0] * len(SIZES)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), COMBINATIONS)
def test_any_bits_in_every_tensor_give_the_bits_of_numpy(options, grad, weight, device):
    rule, moments, numbers = options
    batch = make_batch(moments, weight, [3000], make=random_bits)
    if rule != "adagrad":
        # a sum of squares is not negative, a mean may be
        batch.moments[:1] = [[-m for m in moment] for moment in batch.moments[:1]]
    twin = Twin(rule, [batch], device)
    twin.step([make_grads(batch, grad, 7, random_bits)], Hyper.of(numbers), coefficient=2.0**-10)


def rows(rule):
    """A strategy: hyper-parameters of a rule within what optimizers accept."""
    unit = st.floats(0, 1, exclude_max=True)
    small, flag = st.floats(0, 1e-2), st.sampled_from([0.0, 1.0])
    fields = {
        "adam": (unit, unit, unit, small, unit, flag, flag),
        "sgd": (unit, unit, unit, unit, flag, flag),
        "adagrad": (unit, unit, small, unit, flag),
        "lion": (unit, unit, unit, unit, flag),
    }
    return st.tuples(*fields[rule])


@pytest.mark.parametrize("kind", KINDS, ids=named)
@given(data=st.data())
def test_any_hyper_parameters_and_values_give_the_bits_of_numpy(kind, data, device):
    rule, moments, _ = kind
    grad, weight = data.draw(st.sampled_from(COMBINATIONS))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))

    def drawn(size):
        bits = data.draw(st.lists(float32_bits(), min_size=size, max_size=size))
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32)

    groups = data.draw(st.lists(st.integers(0, 1), min_size=len(sizes), max_size=len(sizes)))
    counts = st.one_of(st.integers(0, 20), st.integers(0, 2**24 - 1))

    def drawn_moment(k, size):
        # of two zeros of different sign, neither is the larger one: means of squares are positive
        return drawn(size).abs() if k else drawn(size)

    masters = [drawn(size) for size in sizes]
    batch = Batch(
        masters=masters,
        weights=None if weight is None else [torch.zeros_like(m, dtype=weight) for m in masters],
        moments=[[drawn_moment(k, size) for size in sizes] for k in range(moments)],
        steps=[torch.tensor(float(data.draw(counts))) for _ in sizes],
        groups=groups,
    )
    grads = [drawn(size).to(grad) for size in sizes]
    hyper = Hyper.of(data.draw(rows(rule)), data.draw(rows(rule)))
    coefficient = data.draw(st.floats(2.0**-30, 2.0**30, width=32))
    Twin(rule, [batch], device).step([grads], hyper, coefficient)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_groups_have_hyper_parameters_of_their_own_in_one_launch(kind, device, launched):
    rule, moments, numbers = kind
    # more tensors than one program prepares
    groups = [(5 * i) % 4 for i in range(150)]
    batch = make_batch(moments, HALF, [3] * 150, groups=groups)
    # flags stay flags
    scaled = [[n * (1 - 0.1 * g) if 0 < n < 1 else n for n in numbers] for g in range(4)]
    hyper = Hyper.of(*map(tuple, scaled))
    twin = Twin(rule, [batch], device)
    launched.clear()
    twin.step([make_grads(batch, HALF, 5)], hyper)
    assert len(launched) == 2


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_learning_rate_in_a_tensor_replaces_the_number_of_its_group(kind, device):
    rule, moments, numbers = kind
    batch = make_batch(moments, None, [5, 5, 5], groups=[0, 1, 2])
    twin = Twin(rule, [batch], device)
    for lr in (0.3, 0.007):
        lrs = (None, torch.tensor(lr), torch.tensor([2 * lr]))
        hyper = Hyper((numbers, (math.nan, *numbers[1:]), numbers), lrs)
        twin.step([make_grads(batch, FULL, 5)], hyper)


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("steps", [0, 1, 2**20 - 1, 2**20 + 12345, 2**24 - 1, 2**24])
def test_every_step_count_that_float32_holds_is_right(kind, steps, device):
    rule, moments, numbers = kind
    # a beta so near 1 that its powers are not lost
    numbers = tuple(1 - 2.0**-21 if 0.5 < n < 1 else n for n in numbers)
    batch = make_batch(moments, HALF, [40], steps=float(steps))
    twin = Twin(rule, [batch], device)
    twin.step([make_grads(batch, HALF, 5)], Hyper.of(numbers))
    # as adding 1 in float32 does
    assert twin.actual[0].steps[0].item() == min(steps + 1, 2**24)


def test_every_tensor_has_its_own_step_count(device):
    rule, moments, numbers = OPTIONS[0]
    batch = make_batch(moments, HALF, [4] * 5)
    batch.steps = [torch.tensor(float(10**i)) for i in range(5)]
    Twin(rule, [batch], device).step([make_grads(batch, HALF, 1)], Hyper.of(numbers))


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[5]], ids=named)
def test_rules_that_need_no_step_count_take_none(kind, device):
    rule, moments, numbers = kind
    batch = make_batch(moments, HALF, [9, 2], steps=None)
    Twin(rule, [batch], device).step([make_grads(batch, HALF, 1)], Hyper.of(numbers))


def test_the_first_update_of_a_velocity_is_the_gradient_whatever_was_there(device):
    batch = make_batch(1, None, [3], steps=0.0)
    batch.moments[0][0].fill_(math.nan)
    twin = Twin("sgd", [batch], device)
    twin.step([[torch.tensor([1.0, -2.0, 4.0])]], Hyper.of((1.0, 0.9, 0.5, 0.0, 0.0, 0.0)), 0.5)
    assert twin.actual[0].moments[0][0].tolist() == [0.5, -1.0, 2.0]


def test_a_weight_decay_that_16_bits_would_lose_moves_the_master(device):
    batch = make_batch(2, HALF, [1000], steps=0.0)
    batch.masters[0].fill_(1.0)
    for moment in batch.moments:
        moment[0].zero_()
    twin = Twin("adam", [batch], device)
    hyper = Hyper.of((1e-4, 0.9, 0.999, 1e-8, 1e-2, 1.0, 0.0))
    for _ in range(3):
        twin.step([[torch.zeros(1000, dtype=HALF)]], hyper)
    assert (twin.actual[0].masters[0] < 1 - 2.5e-6).all()
    assert (twin.actual[0].weights[0] == 1.0).all()


def test_amsgrad_keeps_the_largest_and_nan(device):
    batch = make_batch(3, None, [4])
    batch.moments[1][0] = torch.tensor([1.0, 4.0, math.nan, 1.0])
    batch.moments[2][0] = torch.tensor([2.0, 2.0, 1.0, math.nan])
    twin = Twin("adam", [batch], device)
    twin.step([[torch.zeros(4)]], Hyper.of((0.1, 0.9, 0.5, 1e-8, 0.0, 1.0, 0.0)))
    values = twin.actual[0].moments[2][0].tolist()
    assert values[:2] == [2.0, 2.0]
    assert all(map(math.isnan, values[2:]))
