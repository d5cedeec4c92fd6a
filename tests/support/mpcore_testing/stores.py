"""What a split has to do to float32 numbers, on any backend: numbers and their judges."""

from __future__ import annotations

import torch

#: numbers that are judged at a time
PIECE = 2**24
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


def all_patterns():
    """Yields all 2^32 patterns of bits, int32, in pieces."""
    for first in range(-(2**31), 2**31, PIECE):
        yield torch.arange(first, first + PIECE).to(torch.int32)


def sampled_patterns():
    """Yields every upper half of a float32 number with lower ones around ties and by chance."""
    upper = torch.arange(-(2**15), 2**15) << 16
    chosen = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF]
    chance = torch.randint(2**16, (10,), generator=torch.Generator().manual_seed(0)).tolist()
    for lower in chosen + chance:
        yield (upper | lower).to(torch.int32)


def every_exponent_of_float16(mantissas):
    """Yields patterns around the range of float16: all from 2^-16 to 65504 on, some below.

    Args:
        mantissas: How many of each exponent and sign; None: all of them.
    """
    for sign in (0, -(2**31)):
        for exponent in range(80, 144):
            exact = 127 - 16 <= exponent <= 127 + 15
            count = mantissas or (2**23 if exact else 2**16)
            places = torch.arange(count) * (2**23 // count)
            # both ends, and an odd place in between, of what is left out
            places = torch.cat([places, places + (2**23 // count - 1), places | 1])
            yield (sign + (exponent << 23) + places.clamp(max=2**23 - 1)).to(torch.int32)


def assert_bfloat16_is_split(split, join, bits):
    """Fails unless numbers are what `mpcore.stores.split` says, by integers of torch."""
    value = bits.view(torch.float32)
    weight, remainder = split(value, torch.bfloat16)
    magnitude = bits & _MAGNITUDE
    back = join(weight, remainder).view(torch.int32)
    exact = (magnitude <= 0x7F7F0000) | (magnitude == _INFINITY)
    assert torch.equal(back[exact], bits[exact])
    is_nan = magnitude > _INFINITY
    assert weight[is_nan].isnan().all()
    assert back[is_nan].view(torch.float32).isnan().all()
    beyond = (magnitude > 0x7F7F0000) & (magnitude < _INFINITY)
    assert ((back[beyond] & _MAGNITUDE) == 0x7F7F0000).all()
    assert ((back[beyond] < 0) == (bits[beyond] < 0)).all()
    # torch rounds to nearest, ties to even; where a tie went down it has to go up
    went_down = ((bits & 0xFFFF) == 0x8000) & ((bits & 0x10000) == 0)
    expected = value.to(torch.bfloat16).view(torch.int16) + went_down
    words = weight.view(torch.int16)
    assert torch.equal(words[exact], expected.to(torch.int16)[exact])


def assert_float16_is_split(split, join, bits):
    """Fails unless numbers are what `mpcore.stores.split` says, by torch's float64."""
    value = bits.view(torch.float32)
    weight, remainder = split(value, torch.float16)
    back, size = join(weight, remainder), value.abs()
    exact = (size >= 2.0**-16) & (size <= 65504)
    assert torch.equal(back[exact].view(torch.int32), bits[exact])
    below = size < 2.0**-16
    assert ((back.double() - value.double())[below].abs() <= 2.0**-40).all()
    beyond = (size > 65504) & value.isfinite()
    assert torch.equal(back[beyond], value[beyond].sign() * 65504)
    rounded = value.clamp(-65504, 65504).to(torch.float16)
    assert torch.equal(weight.view(torch.int16), rounded.view(torch.int16))
