"""widen_into against torch's own conversion."""

import pytest
import torch
from hypothesis import given

from mpcore_kernels import cast_into, widen_into
from mpcore_kernels._table import CHUNK
from mpcore_testing.kernels import (
    HALVES,
    SIZES,
    all_patterns,
    assert_same_bits,
    guarded,
    random_bits,
)
from mpcore_testing.strategies import tensors


def assert_widened(values, device, offsets=None, master_offsets=None):
    zeros = [0] * len(values)
    placed = [guarded(v, device, o) for v, o in zip(values, offsets or zeros, strict=True)]
    blanks = [torch.full((v.numel(),), 777.0) for v in values]
    masters = [guarded(b, device, o) for b, o in zip(blanks, master_offsets or zeros, strict=True)]
    widen_into([p.tensor for p in placed], [m.tensor for m in masters])
    for p, m, v in zip(placed, masters, values, strict=True):
        p.assert_margins_intact()
        m.assert_margins_intact()
        assert_same_bits(p.tensor, v)
        assert_same_bits(m.tensor.cpu(), v.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_widen_into_is_exact_for_all_65536_patterns(dtype, device):
    assert_widened([all_patterns(dtype)], device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_widen_into_touches_a_tensor_of_any_size_and_nothing_around_it(dtype, size, device):
    assert_widened([random_bits(size, dtype, seed=size)], device)


def test_widen_into_takes_many_tensors_of_mixed_sizes_and_dtypes_in_one_call(device):
    shuffled = [SIZES[(3 * i) % len(SIZES)] for i in range(2 * len(SIZES))]
    assert_widened([random_bits(n, HALVES[i % 2], seed=i) for i, n in enumerate(shuffled)], device)


@given(values=tensors(dtypes=tuple(HALVES)))
def test_widen_into_is_exact_for_any_bits(values, device):
    assert_widened(values, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 7])
def test_widen_into_handles_views_that_are_not_aligned(dtype, offset, device):
    values = [random_bits(2 * CHUNK + 9, dtype, seed=i) for i in range(2)]
    assert_widened(values, device, offsets=[offset, 0])
    assert_widened(values, device, master_offsets=[0, offset])


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_into_undoes_widen_into(dtype, device):
    weight = all_patterns(dtype).to(device)
    master, back = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(weight)
    widen_into([weight], [master])
    found_inf = torch.zeros((), dtype=torch.int32, device=device)
    saturated = torch.zeros((), dtype=torch.int64, device=device)
    cast_into([master], [back], found_inf, saturated)
    assert_same_bits(back, weight.cpu())
    assert saturated.item() == 0


@pytest.mark.exhaustive
def test_widen_into_takes_20000_tensors(device):
    weights = [
        torch.full((1 + i % 3,), 1.0 + i % 7, dtype=HALVES[i % 2], device=device)
        for i in range(20_000)
    ]
    masters = [torch.empty_like(weight, dtype=torch.float32) for weight in weights]
    widen_into(weights, masters)
    assert_same_bits(torch.cat(masters), torch.cat([weight.float() for weight in weights]))


def test_widen_into_tells_autograd_what_it_wrote_and_nothing_else(device):
    weight = torch.ones(2, dtype=torch.float16, device=device)
    master = torch.zeros(2, device=device)
    versions = weight._version, master._version
    widen_into([weight], [master])
    assert weight._version == versions[0]
    assert master._version > versions[1]


def test_widen_into_of_empty_lists_does_nothing():
    widen_into([], [])


def test_widen_into_refuses_what_it_cannot_write(device):
    weight = torch.ones(4, dtype=torch.float16, device=device)
    master = torch.zeros(4, device=device)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected torch.float16 or torch.bfloat16"):
        widen_into([master], [master.clone()])
    with pytest.raises(ValueError, match=r"masters\[0\]: expected torch.float32"):
        widen_into([weight], [weight.clone()])
    with pytest.raises(ValueError, match="masters: expected 1 tensors"):
        widen_into([weight], [])
    with pytest.raises(TypeError, match=r"weights\[0\]: expected a torch.Tensor"):
        widen_into([], [master])
    with pytest.raises(ValueError, match=r"masters\[1\]: expected memory of its own"):
        widen_into([weight, weight], [master, master])
    assert not master.any()
