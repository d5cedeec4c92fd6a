"""Inputs for the kernels, made of raw bits, and comparisons that look at bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcore_kernels._table import CHUNK, ROUND
from mpcore_testing.comparisons import TALLY

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32]
INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
# around the borders of chunks and of what masked bodies take at a time
SIZES = [0, 1, 7, ROUND - 1, ROUND, ROUND + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
# a NaN, so that a value read from outside a tensor shows in the result and in the flags
POISON = {torch.float16: 0x7E5A, torch.bfloat16: 0x7FDA, torch.float32: 0x7FDA5A5A}


def bits_of(tensor):
    """The bits of a tensor as integers, all NaNs made equal: payloads are no contract."""
    if not tensor.is_floating_point():
        return tensor.cpu()
    bits = tensor.detach().cpu().contiguous().view(INTEGER[tensor.dtype])
    return torch.where(tensor.detach().cpu().isnan(), POISON[tensor.dtype], bits)


def assert_same_bits(actual, expected):
    """Fails unless both tensors hold the same bits, up to the payload of NaNs."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    TALLY.add(actual.numel())
    differs = (bits_of(actual) != bits_of(expected)).nonzero()
    if len(differs):
        where = tuple(differs[0].tolist())
        raise AssertionError(
            f"{len(differs)} of {actual.numel()} elements differ; the first is {where}: "
            f"got {actual.cpu()[where].item()!r}, expected {expected.cpu()[where].item()!r}"
        )


def all_patterns(dtype):
    """All 65,536 values of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def random_bits(size, dtype, seed):
    """Values with uniformly drawn bits: all exponents, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(INTEGER[dtype])
    bits = torch.randint(info.min, info.max + 1, (size,), generator=generator, dtype=torch.int64)
    return bits.to(INTEGER[dtype]).view(dtype)


def random_finite(size, dtype, seed):
    """Values with uniformly drawn bits, but 1 in place of those that are not below 256."""
    values = random_bits(size, dtype, seed)
    return torch.where(values.isfinite() & (values.abs() < 256), values, 1.0).to(dtype)


def rounding_boundaries():
    """FP32 values around every place where a cast to a narrower format could round.

    For each sign and exponent and each number of dropped bits: just below, at and just above half
    of the last place, and the ends, under a last place that is even, odd, and carries.
    """
    mantissas = {0, 1, 2**23 - 1}
    for dropped in range(1, 24):
        half = 1 << (dropped - 1)
        kept_ones = (2**23 - 1) >> dropped << dropped
        for high in (0, (1 << dropped) & kept_ones, kept_ones):
            mantissas |= {high + low for low in (0, half - 1, half, half + 1, 2 * half - 1)}
    mantissas = torch.tensor(sorted(m for m in mantissas if m < 2**23), dtype=torch.int64)
    high_bits = torch.arange(-256, 256, dtype=torch.int64) << 23
    return (high_bits[:, None] + mantissas).flatten().to(torch.int32).view(torch.float32)


@dataclass
class Guarded:
    """A tensor in the middle of a larger, poisoned buffer."""

    tensor: torch.Tensor
    buffer: torch.Tensor
    start: int

    def assert_margins_intact(self):
        """Fails if anything outside the tensor was written."""
        raw = self.buffer.cpu().view(INTEGER[self.buffer.dtype])
        after = self.start + self.tensor.numel()
        assert (raw[: self.start] == POISON[self.buffer.dtype]).all()
        assert (raw[after:] == POISON[self.buffer.dtype]).all()


def guarded(values, device, offset=0):
    """Places 1-d `values` on `device`, `offset` elements past an aligned address, with margins."""
    start = 64 + offset
    raw = torch.full((start + values.numel() + 64,), POISON[values.dtype])
    buffer = raw.to(INTEGER[values.dtype]).view(values.dtype).to(device)
    tensor = buffer[start : start + values.numel()]
    tensor.copy_(values)
    return Guarded(tensor, buffer, start)


def flags(count, device):
    """The `nonfinite` argument for `count` tensors."""
    return torch.zeros(count, dtype=torch.int32, device=device)
