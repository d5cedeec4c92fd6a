"""Sums over ranks: exact in any order, against fractions."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.ranks.exact_sum import DIGITS, from_digits, to_digits

UNIT = Fraction(2) ** -330

squares = st.builds(
    lambda fraction, exponent: fraction * 2.0**exponent,
    st.floats(1.0, 2.0, exclude_max=True),
    st.integers(-270, 390),
)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def stands_for(digits: torch.Tensor) -> Fraction:
    return sum((int(d) * Fraction(2) ** (32 * k) for k, d in enumerate(digits)), Fraction()) * UNIT


@given(st.lists(squares, min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_a_sum_is_exact_in_any_order(numbers: list[float], draw: object) -> None:
    exact = sum(map(Fraction, numbers), Fraction())
    digits = torch.stack([to_digits(scalar(number)) for number in numbers])
    assert digits.shape == (len(numbers), DIGITS)
    assert (digits >= 0).all()
    assert int(digits.max()) < 2**34  # so that 2^29 ranks fit
    shuffled = digits[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))]
    total = digits.sum(dim=0)
    assert torch.equal(total, shuffled.sum(dim=0))
    assert stands_for(total) == exact
    # each digit is rounded to float64 once, and a few additions follow
    assert abs(Fraction(float(from_digits(total))) - exact) <= exact * Fraction(2) ** -52


@given(st.integers(-1074, -271))
def test_what_is_below_the_lowest_digit_is_dropped(exponent: int) -> None:
    number = 1.25 * 2.0**exponent
    assert stands_for(to_digits(scalar(number))) == Fraction(number) // UNIT * UNIT


def test_what_is_no_number_counts_as_nothing() -> None:
    for number in (0.0, float("inf"), float("nan")):
        assert not to_digits(scalar(number)).any()
