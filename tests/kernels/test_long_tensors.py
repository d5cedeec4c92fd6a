"""Tensors of more than 2^31 elements, without the memory: tables whose tensors start far away.

An entry says that its tensor starts 2^33 elements before the memory that is there, and that its
first program ran long ago. So the programs that run are those at the tensor's end, and every
offset from the tensor's start is beyond 32 bits.
"""

import pytest
import torch

from mpcore_kernels import _chunks, _finish, cast, unscale
from mpcore_kernels._table import CHUNK, Table
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    assert_same_bits,
    flags,
    guarded,
    random_bits,
    random_finite,
)

FAR = 2**33
# a full chunk, and one that ends in the middle of a round
SIZE = CHUNK + 1500
PROGRAMS = 2
OFFSETS = [0, 3]


def far_table(source, destination, index=0):
    """The table of the last two chunks of a pair of tensors."""
    addresses = [t.data_ptr() - FAR * t.element_size() for t in (source, destination)]
    entry = [*addresses, FAR + SIZE, -(FAR // CHUNK), index]
    entries = torch.tensor([entry], dtype=torch.int64, device=source.device)
    owners = torch.zeros(PROGRAMS, dtype=torch.int64, device=source.device)
    return Table(source.dtype, destination.dtype, entries, owners)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_reaches_elements_beyond_32_bits(dtype, offset, device):
    values = random_finite(SIZE, dtype, seed=1)
    grad = guarded(values, device, offset)
    out = guarded(torch.full((SIZE,), 777.0), device, offset)
    half = torch.tensor(0.5, device=device)
    nonfinite = flags(3, device)
    unscale._launch([far_table(grad.tensor, out.tensor, index=1)], half, nonfinite)
    assert_same_bits(out.tensor, values.float() * 0.5)
    unscale._launch([far_table(grad.tensor, grad.tensor, index=1)], half, nonfinite)
    assert_same_bits(grad.tensor, (values.float() * 0.5).to(dtype))
    assert nonfinite.tolist() == [0, 0, 0]
    grad.tensor[-1] = torch.nan
    unscale._launch([far_table(grad.tensor, out.tensor, index=1)], half, nonfinite)
    assert nonfinite.tolist() == [0, 1, 0]
    for placed in (grad, out):
        placed.assert_margins_intact()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_cast_reaches_elements_beyond_32_bits(dtype, offset, device):
    values = random_finite(SIZE, torch.float32, seed=2)
    master = guarded(values, device, offset)
    weight = guarded(torch.full((SIZE,), 3.0, dtype=dtype), device, offset)
    saturated = torch.zeros((), dtype=torch.int64, device=device)
    cast._launch([far_table(master.tensor, weight.tensor)], flags(1, device)[0], saturated)
    assert_same_bits(weight.tensor, values.to(dtype))
    for placed in (master, weight):
        placed.assert_margins_intact()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_inspect_reads_elements_beyond_32_bits(dtype, offset, device):
    values = random_finite(SIZE, dtype, seed=3)
    values[CHUNK + 1400] = torch.inf
    grad = guarded(values, device, offset)
    table = far_table(grad.tensor, grad.tensor)
    sums = torch.full((PROGRAMS,), -1, dtype=torch.int64, device=device)
    facts = torch.full((3, PROGRAMS), -1, dtype=torch.int32, device=device)
    counters = torch.zeros(1, 262, dtype=torch.int64, device=device)
    _chunks.variant(dtype, True).launch(
        PROGRAMS,
        (
            *(table.entries, table.owners, torch.ones((), device=device), 0),
            *(sums, facts, PROGRAMS, 0, counters),
        ),
    )
    largest = [
        v[v.isfinite()].abs().max() for v in (values[:CHUNK].float(), values[CHUNK:].float())
    ]
    assert facts[0].view(torch.float32).tolist() == [value.item() for value in largest]
    assert facts[1:].tolist() == [[0, 2], [0, 1400]]
    assert counters[0, :6].sum().item() == counters[0, 6:].sum().item() == SIZE
    assert counters[0, 1].item() == 1


def test_finish_tells_places_beyond_32_bits(device):
    # the place of chunk 2^19 is element 2^31
    chunks = 2**19 + 1
    kinds = torch.zeros(chunks, dtype=torch.int32)
    kinds[-1] = 1
    facts = torch.stack([torch.zeros_like(kinds), kinds, torch.full_like(kinds, 9)]).to(device)
    outs = [
        torch.full((1,), -7, dtype=dtype, device=device)
        for dtype in (torch.int32, torch.int64, torch.float64, torch.float32)
    ]
    totals = [torch.zeros((), dtype=d, device=device) for d in (torch.int32, *[torch.float32] * 3)]
    _finish.variant().launch(
        2,
        (
            torch.tensor([[0, chunks]], device=device),
            *(torch.zeros(chunks, dtype=torch.int64, device=device), facts, chunks),
            *(torch.ones((), device=device), 0, 1.0, *outs, *totals),
        ),
    )
    assert (outs[0].item(), outs[1].item(), totals[0].item()) == (1, 2**31 + 9, 1)


def test_random_bits_far_away_are_unscaled_like_those_nearby(device):
    for dtype in FLOATS:
        values = random_bits(SIZE, dtype, seed=4)
        grad = guarded(values, device)
        nonfinite = flags(1, device)
        table = far_table(grad.tensor, grad.tensor)
        unscale._launch([table], torch.tensor(2.0**-7, device=device), nonfinite)
        assert_same_bits(grad.tensor, (values.float() * 2.0**-7).to(dtype))
        assert nonfinite.item() == int(not grad.tensor.isfinite().all())
