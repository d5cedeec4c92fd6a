"""The cpu backend: the reference backend's bits where those are exact, blocked for the cache."""

import numpy as np
import pytest
import torch
from mpcore.backends import cpu, reference
from mpcore.backends._blocks import CHUNK, blocks, memory_order

from mpcore_testing.bits import same_bits

HALVES = [torch.float16, torch.bfloat16]
# around a block and around the shortest tensor that is split for its norm
SIZES = [0, 1, 7, 4096, 2**17 + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3]


def values(size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * 50).to(dtype)


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def settled(tensors):
    """Returns tensors whose NaNs have one payload: which one is nobody's promise."""
    return [torch.where(t.isnan(), torch.nan, t) for t in tensors]


def flags(size):
    return torch.zeros(size, dtype=torch.int32)


def scalar(number):
    return torch.tensor(number, dtype=torch.float32)


def with_bad_values(grads):
    """Puts an infinity or a NaN at the first, last and block-border places of some gradients."""
    for index, (place, value) in enumerate(
        [(0, torch.inf), (-1, torch.nan), (CHUNK - 1, -torch.inf)]
    ):
        grads[-2 - index][place if abs(place) < grads[-2 - index].numel() else 0] = value
    return grads


@pytest.mark.parametrize("sizes", [SIZES, [5] * 300, [CHUNK * 2 + 64]])
def test_blocks_hold_every_element_once_in_order_and_no_more_than_they_may(sizes):
    seen = [0] * len(sizes)
    for block in blocks(sizes):
        assert 0 < sum(piece.stop - piece.start for piece in block) <= CHUNK
        for piece in block:
            assert piece.start == seen[piece.index]
            assert piece.start % 64 == 0
            seen[piece.index] = piece.stop
    assert seen == sizes


def test_memory_order_of_a_dense_tensor_is_a_view_of_it():
    image = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    flat = memory_order(image)
    assert flat.data_ptr() == image.data_ptr()
    assert torch.equal(flat, torch.as_strided(image, (24,), (1,)))


@pytest.mark.parametrize("coefficient", [2.0**-14, 0.3, 1.0, 2.0**100])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_unscaled_and_flagged_as_by_the_reference_backend(dtype, coefficient):
    grads = [every_pattern(dtype), *(values(size, dtype, size) for size in SIZES)]
    grads = with_bad_values(grads)
    results = []
    for backend in (cpu, reference):
        outs, found = [torch.empty(g.shape) for g in grads], flags(len(grads))
        backend.unscale_into(grads, outs, scalar(coefficient), found)
        results.append([*settled(outs), found])
        in_place, found = [out.clone() for out in outs], flags(len(grads))
        backend.unscale_(in_place, scalar(coefficient), found)
        results[-1] += [*settled(in_place), found]
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_what_the_fast_pass_does_not_know_is_unscaled_as_well(dtype):
    results = []
    for backend in (cpu, reference):
        grads = [values(100, dtype), values(100, dtype).view(10, 10)[:, ::2]]
        found = flags(2)
        backend.unscale_(grads, scalar(0.3), found)
        results.append([*(g.contiguous() for g in grads), found])
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("skip", [0, 1])
def test_masters_are_rounded_and_clamped_as_by_the_reference_backend(dtype, skip):
    largest = torch.finfo(dtype).max
    masters = [values(size, torch.float32, size) for size in SIZES]
    masters.append(torch.tensor([largest, 1.003 * largest, -torch.inf, torch.nan, 65519.9]))
    masters.append(torch.randn(8, 6).t())
    results = []
    for backend in (cpu, reference):
        weights = [torch.zeros_like(master, dtype=dtype) for master in masters]
        count = torch.zeros((), dtype=torch.int64)
        backend.cast_into(masters, weights, torch.tensor(skip), count)
        results.append([*(w.contiguous() for w in weights), int(count)])
    assert same_bits(*results)
    assert results[0][-1] == (0 if skip else 1)


def float64_norm(grads, coefficient):
    squares = [(g.double().numpy() * np.float64(coefficient)) ** 2 for g in grads]
    return np.sqrt(sum(float(s.sum()) for s in squares))


@pytest.mark.parametrize("coefficient", [2.0**-16, 0.3, 4.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_norms_are_those_of_numpy_in_float64(dtype, coefficient):
    grads = [values(size, dtype, size) for size in SIZES]
    found = cpu.inspect(grads, scalar(coefficient), 1.0)
    exact = float64_norm(grads, scalar(coefficient).item())
    # float32 dot products of 2^17 elements: about 2^10 additions in each of their lanes
    assert found.grad_norm.item() == pytest.approx(exact, rel=1e-6)
    clip = min(1.0, 1.0 / (exact + 1e-6))
    assert found.coefficient.item() == pytest.approx(scalar(coefficient).item() * clip, rel=1e-6)
    for grad, square_sum in zip(grads, found.square_sum.tolist(), strict=True):
        norm = float64_norm([grad], scalar(coefficient).item())
        assert square_sum**0.5 == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (3e38, torch.bfloat16),
        (3e38, torch.float32),
        (1e-30, torch.bfloat16),
        (1e-44, torch.float32),
    ],
)
def test_squares_neither_overflow_nor_vanish(value, dtype):
    grads = [torch.full((1000,), value).to(dtype)]
    found = cpu.inspect(grads, scalar(1.0), None)
    assert found.found_inf.item() == 0
    expected = grads[0][0].double().item() * 1000**0.5
    assert found.square_sum[0].item() ** 0.5 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_overflow_is_found_and_told_as_by_the_reference_backend(dtype):
    for place in (0, 1, CHUNK - 1, CHUNK, CHUNK + 4):
        for bad in (torch.inf, -torch.inf, torch.nan):
            grads = [values(5, dtype), torch.zeros(CHUNK + 5, dtype=dtype), values(9, dtype)]
            grads[1][place] = bad
            ours, theirs = (b.inspect(grads, scalar(0.5), 1.0) for b in (cpu, reference))
            assert torch.equal(ours.kinds, theirs.kinds)
            assert torch.equal(ours.first_bad, theirs.first_bad)
            assert ours.found_inf == theirs.found_inf == 1
            assert ours.coefficient.item() == 0.5


def test_a_product_that_overflows_is_found():
    grads = [torch.tensor([1.0, 1e30])]
    found = cpu.inspect(grads, scalar(2.0**100), None)
    assert (found.found_inf.item(), found.kinds.tolist(), found.first_bad.tolist()) == (1, [8], [1])


def test_a_limit_that_is_no_limit_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        cpu.inspect([torch.ones(2)], scalar(1.0), -1.0)
