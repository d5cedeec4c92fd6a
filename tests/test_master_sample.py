"""Updates that 16-bit weights would lose: C, PyTorch, and NumPy say the same, whatever the bits."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from mpcore.backends import MasterSample, _c_sample, _sample
from torch import Tensor

#: float32 numbers around everything that rounding to 16 bits treats in its own way.
ODD = [
    *(0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 2.0**-26, 1.5 * 2.0**-25),
    *(2.0**-14, 2.0**-14 - 2.0**-25, 3.38e38, 3.3961e38, 1e-45, float("inf"), float("nan")),
]


def numbers(count: int, seed: int) -> Tensor:
    """Returns float32 numbers of any bits, a third of them within a last place of another's."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, count, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    values[: len(ODD) * 2] = torch.tensor([*ODD, *(-value for value in ODD)])[:count]
    usual = torch.from_numpy(random.standard_normal(count).astype(np.float32))
    return torch.where(torch.from_numpy(random.random(count) < 0.5), values, usual)


def in_numpy(before: Tensor, after: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Counts in NumPy's arithmetic, one number after the other; bfloat16 by its definition."""
    lost = moved = 0
    for old, new in zip(before.numpy(), after.numpy(), strict=True):
        with np.errstate(all="ignore"):
            weight = rounded(old, dtype)
            alone = rounded(np.float32(weight + np.float32(new - old)), dtype)
        changed = bool(new != old)
        moved += changed
        lost += changed and bool(alone == weight)
    return lost, moved


def rounded(value: np.float32, dtype: torch.dtype) -> np.float32:
    """Returns the nearest number of a format, ties to even."""
    if dtype == torch.float16:
        return np.float32(np.float16(value))
    if not np.isfinite(value):
        return value
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low = bits & 0xFFFF
    up = low > 0x8000 or (low == 0x8000 and bits >> 16 & 1)
    return np.array([(bits >> 16) + up << 16], dtype=np.uint32).view(np.float32)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_three_ways_to_count_agree_on_any_bits(dtype: torch.dtype, seed: int) -> None:
    sizes = [1, 7, 8, 511, 513, 1000, 0, 64]
    before = [numbers(size, 10 * seed + i) for i, size in enumerate(sizes)]
    after = [
        torch.where(torch.rand(len(old)) < 0.7, old + old * 2e-4 * torch.randn(len(old)), new)
        for old, new in zip(before, (numbers(s, 99 + seed) for s in sizes), strict=True)
    ]
    after[3] = before[3].clone()  # nobody moved
    sample = MasterSample(before, 4096, dtype)
    found = sample.lost(after).tolist()
    assert found == _sample.lost_updates(torch.cat(before), after, 4096, dtype).tolist()
    assert tuple(found) == in_numpy(torch.cat(before), torch.cat(after), dtype)
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_sample_in_c_is_that_of_slices(most: int) -> None:
    masters = [torch.randn(size) for size in (1, 2, 5, 6, 299, 300)]
    masters.append(torch.randn(6, 50).t())  # not in the order of its elements
    sample = MasterSample(masters, most, torch.float16)
    assert torch.equal(sample._before, _sample.sampled(masters, most))
    moved = [master + 1e-4 * torch.randn_like(master) for master in masters]
    expected = _sample.lost_updates(_sample.sampled(masters, most), moved, most, torch.float16)
    assert sample.lost(moved).tolist() == expected.tolist()


def test_without_the_library_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    masters = [torch.randn(50)]
    moved = [masters[0] * 1.0002]
    expected = MasterSample(masters, 8, torch.float16).lost(moved).tolist()
    monkeypatch.setattr(_c_sample, "comes_built", lambda: False)
    assert MasterSample(masters, 8, torch.float16).lost(moved).tolist() == expected
    assert expected[1] == 9  # every sixth of 50


def test_the_sample_is_a_copy() -> None:
    master = torch.ones(4)
    sample = MasterSample([master], 8, torch.float16)
    master += 1
    assert sample.lost([master]).tolist() == [0, 4]


@pytest.mark.parametrize("sizes", [(5,), (3, 400), (7, 100, 1)])
def test_the_largest_move_and_what_stood_are_those_of_numpy(sizes: tuple[int, ...]) -> None:
    before = [torch.randn(size) for size in sizes]
    sample = MasterSample(before, 50, torch.float16)
    taken = [old.numpy()[:: max(1, len(old) // 50)].copy() for old in before]
    for master in before:
        master[::3] += 0.25 * torch.randn(len(master[::3]))
    now = [new.numpy()[:: max(1, len(new) // 50)] for new in before]
    old, new = np.concatenate(taken), np.concatenate(now)
    most, usual = sample.sizes_of_moves(before)
    assert sample.count == len(old)
    assert most == np.abs(new - old).max()
    stood = np.sort(np.abs(old[old == new]))
    assert usual == stood[(len(stood) - 1) // 2]  # of an even number the lower, as in torch


def test_where_all_moved_nothing_stood() -> None:
    master = torch.ones(4)
    sample = MasterSample([master], 8, torch.float16)
    master += 1
    assert sample.sizes_of_moves([master]) == (1.0, 0.0)
