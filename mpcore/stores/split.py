"""The split of a float32 number: a 16-bit weight, and an int16 remainder beside it.

The weight is the number rounded to nearest, and the remainder is what was rounded off, in units of
2^-16 of the weight's last place:

    bfloat16    weight = (bits + 0x8000) >> 16      ties away from zero
                remainder = bits - (weight << 16)   as Transformer Engine and Apex have it
    float16     weight = float16(x)                 ties to even
                remainder = (x - weight) / unit     rounded to an integer, at most 32767

A bfloat16 weight and its remainder are all bits of a float32 number; ties cannot go to even, since
an even weight would then have 65,537 numbers and a remainder has 65,536 values. In float16 three
more bits than a float32 number has are left: every number from 2^-16 to 65504 comes back exactly,
and below that within 2^-40. Exhaustive tests: `tests/test_split.py`.

Finite numbers beyond the largest finite weight become it; infinities and NaNs have remainder 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
#: 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even.
_TO_INTEGER = 12582912.0


@torch.no_grad()
def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a 16-bit weight and the int16 remainder of float32 `value`; no host sync.

    Args:
        value: float32, any shape and strides, which both results have.
        dtype: Of the weight: float16 or bfloat16.

    Example:
        >>> weight, remainder = split(torch.tensor([1.001]), torch.bfloat16)
        >>> weight.item(), remainder.item()
        (1.0, 8389)
        >>> join(weight, remainder).item() == torch.tensor(1.001).item()
        True
    """
    largest = torch.finfo(dtype).max
    clamped = torch.where(is_clamped(value, dtype), value.clamp(-largest, largest), value)
    if dtype == torch.bfloat16:
        return _split_bfloat16(clamped)
    return _split_float16(clamped)


@torch.no_grad()
def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """Returns the float32 number that a weight and its remainder stand for; no host sync.

    A weight that others wrote to is joined with a remainder that was not made for it. What comes
    out is less than a place of the weight away from it, has its sign or is 0, and is an infinity or
    a NaN if the weight is.

    Args:
        weight: float16 or bfloat16.
        remainder: int16, its shape and strides.
    """
    if weight.dtype == torch.bfloat16:
        return _join_bfloat16(weight, remainder)
    return _join_float16(weight, remainder)


@torch.no_grad()
def is_clamped(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns which float32 numbers are finite and beyond the largest finite weight; no host sync.

    Example:
        >>> is_clamped(torch.tensor([65504.0, 65505.0, torch.inf]), torch.float16).tolist()
        [False, True, False]
    """
    return (value.abs() > torch.finfo(dtype).max) & value.isfinite()


def _split_bfloat16(value: Tensor) -> tuple[Tensor, Tensor]:
    bits = value.view(torch.int32)
    # a NaN must not round: a carry would make it -0 or an infinity. It is quieted instead.
    is_nan = (bits & _MAGNITUDE) > _INFINITY
    upper = torch.where(is_nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    lower = torch.where(is_nan, 0, bits - (upper << 16))
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def _join_bfloat16(weight: Tensor, remainder: Tensor) -> Tensor:
    upper = weight.view(torch.int16).to(torch.int32)
    sign, magnitude = upper & 0x8000, upper & 0x7FFF
    # behind an infinity or a NaN there is nothing, and nothing is below 0
    lower = torch.where(magnitude >= 0x7F80, 0, remainder.to(torch.int32))
    return ((sign << 16) | ((magnitude << 16) + lower).clamp(min=0)).view(torch.float32)


def _unit_exponents(weight: Tensor) -> Tensor:
    """Returns the exponents of float16 weights' last places, with the bias of float32."""
    exponents = (weight.view(torch.int16).to(torch.int32) >> 10) & 0x1F
    return exponents.clamp(min=1) + (127 - 15 - 10)


def _split_float16(value: Tensor) -> tuple[Tensor, Tensor]:
    weight = value.to(torch.float16)
    per_unit = ((2 * 127 + 16 - _unit_exponents(weight)) << 23).view(torch.float32)
    rest = (value - weight.float()) * per_unit
    whole = ((rest + _TO_INTEGER) - _TO_INTEGER).clamp(max=32767.0)
    whole = torch.where(value.isfinite(), whole, 0.0)
    return weight, whole.to(torch.int16)


def _join_float16(weight: Tensor, remainder: Tensor) -> Tensor:
    unit = ((_unit_exponents(weight) - 16) << 23).view(torch.float32)
    # what is subtracted is +0 where there is no remainder: -0 stays -0
    return weight.float() - (-remainder.to(torch.int32)).float() * unit
