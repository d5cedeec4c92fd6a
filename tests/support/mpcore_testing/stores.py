"""Stores under test: what a split has to do to float32 numbers, and batches kept in other ways."""

from __future__ import annotations

from dataclasses import replace

import torch
from mpcore.stores import MASTER_STORES, MOMENT_STORES, key_of, moment_store

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


def kept(batch, store="float32", moments="float32", negative=None):
    """A copy of a batch of float32 masters and moments, kept in other stores.

    Args:
        batch: Stays as it is. Its weights become what the store makes of the masters.
        store: Of masters; parameters of no 16-bit weight keep theirs.
        moments: What a user asks for; each tensor of a batch has to get the same.
        negative: Whether each moment may be negative; None: the first alone.
    """
    batch = batch.on("cpu")
    names, held, scales = [], [], []
    for k, tensors in enumerate(batch.moments):
        signed = k == 0 if negative is None else negative[k]
        stores = [moment_store(moments, t.shape, t.stride(), negative=signed) for t in tensors]
        (name,) = {store.name for store in stores} or {moments}
        encoded = [MOMENT_STORES[name].encode(tensor) for tensor in tensors]
        names.append(name)
        held.append([tensor for tensor, _ in encoded])
        scales.append([s for _, s in encoded] if MOMENT_STORES[name].has_scales else None)
    batch = replace(batch, moments=held, moment_stores=tuple(names), scales=tuple(scales))
    batch.keys = [key_of(5, i) for i in range(len(batch.masters))]
    if batch.weights is None or store == "float32":
        return batch
    dtype = batch.weights[0].dtype
    encoded = [MASTER_STORES[store].encode(master, dtype) for master in batch.masters]
    weights = [master.weight for master in encoded]
    if store == "none":
        return replace(batch, store=store, masters=weights, weights=None)
    return replace(batch, store=store, masters=[m.beside for m in encoded], weights=weights)


def masters_of(batch):
    """The float32 masters of a batch."""
    if batch.store == "none":
        return [weight.float() for weight in batch.masters]
    if batch.weights is None:
        return batch.masters
    pairs = zip(batch.weights, batch.masters, strict=True)
    return [MASTER_STORES[batch.store].decode(weight, held) for weight, held in pairs]
