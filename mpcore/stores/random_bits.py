"""Random bits of a stochastic rounding: a hash of who rounds, when and where.

    key         of a parameter: a seed and an id, 64 bits
    t           the step count that the update makes, from 1
    offset      place of the element in the full tensor, as it lies in memory, modulo 2^32
    word        0 or 1: moments 0 and 1 take the lower and upper half of the first,
                moment 2 and the weight those of the second

    h = lowbias32 (Wellons, "Prospecting for hash functions", 2018), two rounds
    a = h(h(t ^ low(key)) + high(key) + word * 0x9E3779B9)      once per tensor and step
    b = h(a ^ high(key))                                        likewise
    bits = h(offset + a), with b added between its two rounds   once per element

So nothing is remembered: a step that is skipped changes no later one, a resumed training goes on
with the same bits, and shards of one tensor have those of the whole. Every constant of an element's
hash is odd and every shift undoes itself, so that over 2^32 offsets each value comes once: both
halves are exactly uniform, and together as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FIRST, _SECOND, _GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
#: The site of a weight, behind those of three moments: its own number in `random_bits`.
WEIGHT_SITE = 3


def key_of(seed: int, identity: int) -> int:
    """Returns the key of a parameter, 64 bits: SplitMix64 of both numbers.

    Args:
        seed: Any integer; its lower 64 bits count.
        identity: Of the parameter, the same after a resume, such as its place in the param groups.

    Example:
        >>> hex(key_of(0, 1)), key_of(0, 1) == key_of(1, 0)
        ('0xd94259df0d440a18', False)
    """
    state = _mix64((seed & (2**64 - 1)) ^ 0x6A09E667F3BCC909)
    return _mix64((state + (identity + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1))


def _mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def _mix32(x: Tensor, between: Tensor | int = 0) -> Tensor:
    """lowbias32 of int64 numbers below 2^32, with a number added between its rounds."""
    x = ((x ^ (x >> 16)) * _FIRST) & _MASK
    x = (((x ^ (x >> 15)) + between) * _SECOND) & _MASK
    return x ^ (x >> 16)


@torch.no_grad()
def random_bits(key: int, t: Tensor, offsets: Tensor, site: int) -> Tensor:
    """Returns 16 random bits for each offset, int64 from 0 to 65535; no host sync.

    Args:
        key: Of the parameter, from `key_of`.
        t: 0-d, any dtype, the step count that the update makes; whole, from 1.
        offsets: int64, any shape.
        site: Which rounding of the element: 0 to 2 for moments, `WEIGHT_SITE` for the weight.

    Example:
        >>> random_bits(key_of(0, 0), torch.tensor(1.0), torch.arange(3), 0).tolist()
        [51822, 36577, 16153]
    """
    low, high = key & _MASK, key >> 32
    t = t.to(torch.int64) & _MASK
    a = _mix32((_mix32(t ^ low) + high + (site // 2) * _GOLDEN) & _MASK)
    b = _mix32(a ^ high)
    word = _mix32((offsets + a) & _MASK, b)
    return (word >> 16 * (site % 2)) & 0xFFFF


def offsets_in_memory(like: Tensor, first: int = 0) -> Tensor:
    """Returns the place of each element of a dense tensor in memory, int64, counted from `first`.

    Example:
        >>> offsets_in_memory(torch.zeros(2, 3).t()).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    places = torch.empty_strided(like.shape, like.stride(), dtype=torch.int64, device=like.device)
    flat = places.as_strided((like.numel(),), (1,))
    torch.arange(first, first + like.numel(), out=flat)
    return places
