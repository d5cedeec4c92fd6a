"""The second launch of `inspect`, on made-up chunks: more than a test could afford to read."""

import math

import pytest
import torch

from mpcore_kernels import _finish
from mpcore_kernels._table import CHUNK

ONE = 0x3F800000


def finish(segments, sums, largest, kinds, places, device, max_norm=math.inf):
    """Runs the launch on chunks given as lists; returns what it writes, in the kernel's order."""
    tensors, chunks = len(segments), len(sums)
    outs = [
        torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in (
            *((tensors, dtype) for dtype in (torch.int32, torch.int64)),
            *((tensors, dtype) for dtype in (torch.float64, torch.float32)),
            *(((), dtype) for dtype in (torch.int32, *[torch.float32] * 3)),
        )
    ]
    _finish.variant().launch(
        1 + tensors,
        (
            torch.tensor(segments, device=device),
            torch.tensor(sums, device=device),
            torch.tensor([largest, kinds, places], dtype=torch.int32, device=device),
            chunks,
            torch.ones((), device=device),
            0,
            max_norm,
            *outs,
        ),
    )
    return [out.tolist() for out in outs]


@pytest.mark.parametrize("chunks", [_finish.BLOCK - 1, _finish.BLOCK, 2 * _finish.BLOCK + 3])
def test_finish_adds_every_chunk_of_every_round(device, chunks):
    sums = [2**46 + i for i in range(chunks)]
    segments = [(0, chunks - 1), (chunks - 1, 1)]
    zeros = [0] * chunks
    found = finish(segments, sums, [ONE] * chunks, zeros, zeros, device)
    kinds, first_bad, square_sum, largest, found_inf, norm, unscale, coefficient = found
    assert square_sum == [sum(sums[:-1]) / 2**46, sums[-1] / 2**46]
    assert (norm, unscale) == (torch.tensor(math.sqrt(sum(sums) / 2**46)).item(), 1.0)
    assert (kinds, first_bad, largest) == ([0, 0], [-1, -1], [1.0, 1.0])
    assert (found_inf, coefficient) == (0, 1.0)


@pytest.mark.parametrize("at", [0, _finish.BLOCK - 1, _finish.BLOCK, 2 * _finish.BLOCK])
def test_finish_finds_what_is_wrong_in_any_round(device, at):
    chunks = 2 * _finish.BLOCK + 1
    zeros = [0] * chunks
    kinds = [4 * (i == at) for i in range(chunks)]
    places = [7] * chunks
    found = finish([(0, chunks)], zeros, zeros, kinds, places, device)
    assert found[:3] == [[4], [at * CHUNK + 7], [math.inf]]
    assert found[4] == 1


@pytest.mark.parametrize("at", [0, _finish.BLOCK - 1, _finish.BLOCK, 2 * _finish.BLOCK])
def test_finish_takes_the_largest_of_any_round(device, at):
    chunks = 2 * _finish.BLOCK + 1
    zeros = [0] * chunks
    largest = [ONE * (i == at) for i in range(chunks)]
    found = finish([(0, chunks)], zeros, largest, zeros, zeros, device)
    assert found[3] == [1.0]
