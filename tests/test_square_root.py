"""Square roots and powers of fused updates, against NumPy's roots and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.updates.rule import power
from mpcore.updates.square_root import sqrt32, sqrt64

from mpcore_testing.bits import same_bits


def assert_roots(function, values):
    """NumPy takes roots with the processor's instruction, which IEEE 754 binds."""
    assert same_bits(function(torch.from_numpy(values)), torch.from_numpy(np.sqrt(values)))


def test_float32_roots_of_every_exponent_are_rounded_to_nearest():
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**31 - 2**23, 2**21, dtype=np.int32)
    assert_roots(sqrt32, patterns.view(np.float32))


def test_float32_roots_next_to_squares_are_rounded_to_nearest():
    squares = np.arange(2**12, dtype=np.float32) ** 2
    for values in (squares, np.nextafter(squares, np.float32(0)), squares * np.float32(2.0**-140)):
        assert_roots(sqrt32, values)
    special = np.array([0.0, -0.0, np.inf, 1e-45], dtype=np.float32)
    assert_roots(sqrt32, special)


def test_float64_roots_are_rounded_to_nearest():
    generator = np.random.default_rng(1)
    exponents = generator.integers(-890, 890, 2**20)
    assert_roots(sqrt64, (generator.random(2**20) + 1) * 2.0**exponents)


def test_float64_roots_next_to_squares_and_powers_are_rounded_to_nearest():
    powers, squares = 4.0 ** np.arange(-400.0, 400.0), np.arange(1.0, 2.0**18) ** 2
    for values in (powers, squares):
        for near in (values, np.nextafter(values, 0.0), np.nextafter(values, np.inf)):
            assert_roots(sqrt64, near)


@pytest.mark.parametrize("value", [0.0, np.inf, 2.0**-1000, 2.0**1000])
def test_float64_roots_of_what_is_not_corrected_are_those_of_the_library(value):
    root = sqrt64(torch.tensor([value], dtype=torch.float64))
    assert root.item() == pytest.approx(np.sqrt(value), rel=2.0**-51)


@given(base=st.floats(0.5, 1.0), exponent=st.integers(0, 2000))
def test_powers_are_as_near_to_the_exact_ones_as_is_said(base, exponent):
    found = power(*(torch.tensor(number, dtype=torch.float64) for number in (base, exponent)))
    exact = Fraction(base) ** exponent
    if exact < Fraction(2) ** -1000:  # on the way to subnormal numbers
        assert found.item() <= 2.0**-999
    else:
        assert abs(Fraction(found.item()) / exact - 1) <= Fraction(2 * exponent, 2**53)
