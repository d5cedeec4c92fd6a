"""Stochastic rounding to bfloat16: exact probabilities over all 65536 draws, by NumPy's float64."""

import numpy as np
import pytest
import torch
from mpcore.stores import rounding

from mpcore_testing import c_stores

ROUNDED = pytest.mark.parametrize(
    "rounded", [rounding.round_randomly, c_stores.round_randomly], ids=["reference", "compiled"]
)
DRAWS = np.arange(2**16)
LARGEST = 2.0**127 * (2 - 2.0**-7)
PIECE = 48


def results(rounded, bits):
    """What numbers of given bits become in each draw, float64: a row for each."""
    value = torch.from_numpy(np.repeat(bits.astype(np.uint32).view(np.float32), 2**16))
    draws = torch.from_numpy(np.tile(DRAWS, len(bits)))
    return rounded(value, draws).double().numpy().reshape(len(bits), 2**16)


def every_exponent():
    """A number of each sign and exponent that is finite, with changing digits in both halves."""
    exponents, signs = np.meshgrid(np.arange(255), [0, 1])
    uppers = np.array([0x7F, 0, 1, 0x55, 0x7E])[exponents % 5]
    uppers[exponents == 254] = 0x7E  # the largest is not in question here
    lowers = np.array([1, 0x8000, 0, 0xFFFF, 0x1234, 0x7FFF, 0xABCD])[(exponents + signs) % 7]
    return ((signs << 31) | (exponents << 23) | (uppers << 16) | lowers).ravel()


@ROUNDED
def test_as_many_draws_go_up_as_there_are_parts_above_the_lower_neighbour(rounded):
    numbers = every_exponent()
    for first in range(0, len(numbers), PIECE):
        bits = numbers[first : first + PIECE]
        exact = bits.astype(np.uint32).view(np.float32).astype(np.float64)
        size = np.abs(exact)
        # 8 digits, of which a subnormal number has fewer
        place = 2.0 ** (np.floor(np.log2(np.maximum(size, 2.0**-126))) - 7)
        below = np.floor(size / place) * place
        parts = (size - below) / place * 2**16
        assert (parts == np.round(parts)).all()  # an oracle that is exact
        signed = results(rounded, bits)
        got = np.abs(signed)
        went_up = got == (below + place)[:, None]
        assert (went_up | (got == below[:, None])).all()
        assert np.array_equal(went_up.sum(axis=1), parts)
        # unbiased: float64 sums 65536 numbers of 9 digits without rounding
        assert np.array_equal(signed.mean(axis=1), exact)


@ROUNDED
def test_signs_of_zeros_stay_in_every_draw(rounded):
    got = results(rounded, np.array([0, 0x80000000]))
    assert (got == 0).all()
    assert np.array_equal(np.signbit(got).all(axis=1), [False, True])
    assert not np.signbit(got[0]).any()


@ROUNDED
def test_no_finite_number_becomes_an_infinity(rounded):
    below, largest = [0x7F7EFFFF, 0x7F7E0001], [0x7F7F0000, 0x7F7F0001, 0x7F7F8000, 0x7F7FFFFF]
    bits = np.array(below + largest)
    for sign in (1, -1):
        got = sign * results(rounded, bits | (0x80000000 if sign < 0 else 0))
        step = 2.0**120
        assert [set(row) for row in got[:2]] == [{LARGEST - step, LARGEST}] * 2
        assert [(row == LARGEST).sum() for row in got[:2]] == [65535, 1]
        assert (got[2:] == LARGEST).all()


@ROUNDED
def test_infinities_and_quiet_nans_stay_in_every_draw(rounded):
    got = results(rounded, np.array([0x7F800000, 0xFF800000]))
    assert (got[0] == np.inf).all()
    assert (got[1] == -np.inf).all()
    assert np.isnan(results(rounded, np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]))).all()


def test_a_nan_with_its_lowest_bit_alone_stays_one():
    # arithmetic makes none of them, which is why the C does not look for it
    assert np.isnan(results(rounding.round_randomly, np.array([0x7F800001, 0xFF80FFFF]))).all()


def test_halves_of_a_word_are_told_apart_in_c():
    value = torch.full((2**16,), 1 + 2.0**-9)
    draws = torch.arange(2**16)
    expected = rounding.round_randomly(value, draws)
    for shift in (0, 16):
        assert torch.equal(c_stores.round_randomly(value, draws, shift), expected)
