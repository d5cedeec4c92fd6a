"""inspect of the reference backend against NumPy in float64, before it may judge the kernels."""

import math

import pytest
import torch
from hypothesis import given
from mpcore import DynamicLossScale
from mpcore.backends import reference
from mpcore.errors import ArgumentError
from mpcore.loss_scale import LossScaleState, next_state
from mpcore.loss_scale.tensors import LossScaleTensors

from mpcore_testing.inspections import (
    assert_inspection,
    assert_same_inspection,
    expected_counts,
    expected_histogram,
)
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    all_patterns,
    random_bits,
    random_finite,
    rounding_boundaries,
)
from mpcore_testing.strategies import float32_bits, tensors

CHUNK = 4096
SIZES = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]


def assert_found(values, coefficient):
    found = reference.inspect(values, torch.tensor(coefficient), None, statistics=True)
    assert_inspection(found, values, coefficient)
    assert found.counts.tolist() == [expected_counts(value) for value in values]
    assert found.histogram.tolist() == [expected_histogram(value) for value in values]


@pytest.mark.parametrize("coefficient", [2.0**-16, 0.37, 2.0**14])
@pytest.mark.parametrize("dtype", HALVES)
def test_reference_inspects_all_65536_patterns_as_numpy_does(dtype, coefficient):
    patterns = all_patterns(dtype)
    assert_found([patterns, patterns[patterns.isfinite()]], coefficient)


def test_reference_inspects_float32_at_every_exponent_as_numpy_does():
    assert_found([rounding_boundaries()[::5], rounding_boundaries()[::5].clamp(-1e3, 1e3)], 0.5)


@pytest.mark.parametrize("make", [random_bits, random_finite])
def test_reference_inspects_mixed_sizes_and_dtypes_as_numpy_does(make):
    values = [make(n, FLOATS[i % 3], seed=i) for i, n in enumerate(SIZES * 3)]
    assert_found(values, 0.37)


@given(values=tensors(), bits=float32_bits())
def test_reference_inspects_any_bits_as_numpy_does(values, bits):
    coefficient = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
    assert_found(values, coefficient)


def test_reference_squares_no_finite_value_to_infinity():
    found = reference.inspect([torch.full((9,), 3e38)], torch.tensor(1.0), 1.0)
    assert found.square_sum.item() == pytest.approx(9 * float(torch.tensor(3e38)) ** 2, rel=1e-6)
    assert found.found_inf.item() == 0
    assert math.isinf(found.grad_norm.item())
    assert found.coefficient.item() > 0


def test_reference_inspects_gradients_that_are_not_dense():
    base = random_finite(60, torch.float32, seed=0).view(6, 10)
    one = torch.tensor(1.0)
    found = reference.inspect([base[:, ::2], base[:1].expand(6, 10)], one, None)
    dense = [base[:, ::2].contiguous(), base[:1].expand(6, 10).t().contiguous()]
    assert_same_inspection(found, reference.inspect(dense, one, None))


def test_reference_inspect_refuses_what_it_would_have_to_round():
    one = torch.tensor(1.0)
    with pytest.raises(ArgumentError, match=r"grads\[1\]: expected float16, bfloat16 or float32"):
        reference.inspect([one, one.double()], one, None)
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ArgumentError, match="max_norm: expected a number of at least 0"):
            reference.inspect([one], one, max_norm)


def test_loss_scale_tensors_advance_as_the_specification_says():
    loss_scale = DynamicLossScale(init=8.0, growth_interval=2, max_scale=16.0, hysteresis=2)
    state = LossScaleState(8.0, 0, 2, 0, 0)
    held = LossScaleTensors.from_state(state, torch.device("cpu"))
    for found_inf in [0, 0, 0, 0, 1, 1, 1, 0, 0, -1, 0, 1, 1, 1, 1, 1]:
        loss_scale.advance_(held, torch.tensor(found_inf))
        state = next_state(loss_scale, state, found_inf=found_inf != 0)
        assert held.to_state() == state
