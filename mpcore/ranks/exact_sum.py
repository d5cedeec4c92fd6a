"""Sums of float64 numbers over ranks whose bits do not depend on the order of addition.

A number is cut into 32-bit digits of a fixed-point number that reaches from 2^-330 to 2^438; digits
are integers, so that adding them is exact in any order, on any topology. What is below 2^-330 is
dropped: a norm of 2^-165.

    x = m * 2^e,  m of 53 bits            digit k = bits 32 k to 32 k + 31 of x * 2^330
    sum over up to 2^29 ranks             no digit overflows int64
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Digits of one number.
DIGITS = 24
_LOWEST = -330
_MASK = 0xFFFFFFFF


def to_digits(value: Tensor) -> Tensor:
    """Returns a number as int64 `[DIGITS]`; no host sync.

    Args:
        value: 0-d float64, at least 0 and below 2^400; what is not finite counts as 0.

    Example:
        >>> digits = to_digits(torch.tensor(3.0, dtype=torch.float64))
        >>> float(from_digits(digits + digits))
        6.0
    """
    value = torch.where(torch.isfinite(value), value, torch.zeros_like(value))
    fraction, exponent = torch.frexp(value)
    whole = (fraction * 2.0**53).to(torch.int64)
    place = exponent.to(torch.int64) - 53 - _LOWEST
    # what begins below the lowest digit loses its low bits
    whole = torch.where(place < 0, whole >> (-place).clamp(0, 62), whole)
    place = place.clamp(min=0)
    index, shift = place // 32, place % 32
    low, high = (whole & _MASK) << shift, (whole >> 32) << shift
    number = torch.arange(DIGITS, device=value.device) - index
    digits = torch.zeros_like(number)
    parts = (low & _MASK, (low >> 32) + (high & _MASK), high >> 32)
    for k, part in enumerate(parts):
        digits = torch.where(number == k, part, digits)
    return digits


def from_digits(digits: Tensor) -> Tensor:
    """Returns what digits, or sums of them, stand for, 0-d float64; no host sync.

    Pairs are added in a fixed order, so that every device that adds elements one by one has the
    same bits.

    Args:
        digits: int64 `[DIGITS]`.
    """
    exponents = torch.arange(DIGITS, device=digits.device) * 32 + _LOWEST
    powers = ((exponents + 1023) << 52).view(torch.float64)  # exact, which torch.ldexp is not
    terms = digits.double() * powers
    terms = torch.nn.functional.pad(terms, (0, 32 - DIGITS))
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    return terms.reshape(())
