"""Weights that somebody else wrote to, and what becomes of masters: NumPy, no code of ours."""

import numpy as np
import torch

from mpcore_testing.kernels import random_bits

LARGEST = {torch.float16: 65504.0, torch.bfloat16: (2.0**8 - 1) * 2.0**120}
#: what others write: numbers, zeros of both signs, the largest, subnormal ones, and no numbers
VALUES = [3.0, torch.nan, -0.0, torch.inf, 0.0, -torch.inf, 65504.0, 6e-8]


def rounded(master, dtype):
    """The 16-bit patterns of float32 values: to nearest even, finite ones clamped."""
    values = master.numpy()
    with np.errstate(over="ignore"):
        limited = np.where(
            np.isfinite(values), np.clip(values, -LARGEST[dtype], LARGEST[dtype]), values
        )
    if dtype == torch.float16:
        return limited.astype(np.float16).view(np.uint16)
    bits = limited.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def expected(weight, master):
    """The masters that there have to be, and how many elements were adopted and refused."""
    bits, wide = weight.view(torch.int16).numpy().view(np.uint16), weight.float().numpy()
    held = master.numpy()
    both_nan = np.isnan(wide) & np.isnan(held)
    differs = (rounded(master, weight.dtype) != bits) & ~both_nan
    adopted = differs & np.isfinite(wide)
    counts = [int(adopted.sum()), int((differs & ~np.isfinite(wide)).sum())]
    return torch.from_numpy(np.where(adopted, wide, held)), counts


def near(weight, seed):
    """Masters of which about half round to their weights, and others by a last place."""
    noise = random_bits(weight.numel(), torch.float32, seed).view(torch.int32)
    shift = 13 if weight.dtype == torch.float16 else 16
    jitter = (noise % (1 << shift)) - (1 << (shift - 1))
    return (weight.float().view(torch.int32) + jitter).view(torch.float32)


def write_to(batch, borders):
    """Makes the weights of a batch its rounded masters, but at borders, and there in turn `VALUES`.

    Args:
        batch: On the CPU, of dense tensors of one dimension.
        borders: Places of which some are left alone, and some are behind the end.
    """
    for master, weight in zip(batch.masters, batch.weights or (), strict=bool(batch.weights)):
        fitting = rounded(master, weight.dtype).view(np.int16)
        weight.copy_(torch.from_numpy(fitting.copy()).view(weight.dtype))
        for turn, place in enumerate(borders):
            if place < len(weight):
                weight[place] = VALUES[turn % len(VALUES)]
        for place in borders[::5]:
            if place < len(weight):
                master[place] = torch.nan  # beside a NaN and others


def adopt(batches):
    """Makes the weights of batches their masters, in place; returns the counts, a row a weight."""
    rows = []
    for batch in batches:
        for master, weight in zip(batch.masters, batch.weights or (), strict=bool(batch.weights)):
            values, counts = expected(weight, master)
            master.copy_(values)
            rows.append(counts)
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2)
