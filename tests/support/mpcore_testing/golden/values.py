"""Numbers that are the same on every machine: integers from a counter, made into floats exactly.

Nothing here is random, transcendental or summed up, so that no version of torch and no processor
has a say in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 2**64 - 1
# repeated in tensors that are longer: a prime, so that no vector and no chunk sees it alike twice
_LONGEST = 1021


def word(*key: int) -> int:
    """64 bits that follow from some whole numbers: the finalizer of SplitMix64, once for each.

    Example:
        >>> hex(word(0))
        '0xe220a8397b1dcdaf'
    """
    state = 0
    for number in key:
        state = (state + number + 1) * 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def numbers(shape: Sequence[int], *key: int, short: bool = False) -> Tensor:
    """float32 of magnitudes below 2, both signs, several exponents.

    Args:
        shape: Of the tensor.
        key: Whole numbers; others give other values.
        short: Four bits of magnitude instead of 24, so that sums of squares are exact in float32
            in any order, also if the values went through 16 bits in between.
    """
    count = torch.Size(shape).numel()
    values = []
    for i in range(min(count, _LONGEST)):
        bits = word(*key, i)
        sign, places = 1 - 2 * (bits & 1), (bits >> 1) & (3 if short else 7)
        size = (bits >> 40) % 15 + 1 if short else bits >> 40
        values.append(sign * size * 2.0 ** -(places + (3 if short else 23)))
    made = torch.tensor(values, dtype=torch.float64).to(torch.float32)
    times = -(-count // max(len(values), 1))
    return made.repeat(times)[:count].reshape(tuple(shape))
