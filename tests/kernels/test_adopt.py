"""adopt_ against NumPy's conversions, element by element."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import compiled, reference

from mpcore_kernels import Launcher, adopt_
from mpcore_kernels._table import CHUNK, ROUND
from mpcore_testing.adoptions import expected, near, rounded
from mpcore_testing.kernels import (
    HALVES,
    SIZES,
    all_patterns,
    assert_same_bits,
    guarded,
    random_bits,
    rounding_boundaries,
)
from mpcore_testing.strategies import tensors


def assert_adopted(weights, masters, device, offsets=None, master_offsets=None, run=adopt_):
    zeros = [0] * len(weights)
    placed = [guarded(w, device, o) for w, o in zip(weights, offsets or zeros, strict=True)]
    held = [guarded(m, device, o) for m, o in zip(masters, master_offsets or zeros, strict=True)]
    counts = torch.full((len(weights), 2), 2**40, dtype=torch.int64, device=device)
    run([p.tensor for p in placed], [m.tensor for m in held], counts)
    for p, m, weight, master, found in zip(
        placed, held, weights, masters, counts.tolist(), strict=True
    ):
        p.assert_margins_intact()
        m.assert_margins_intact()
        assert_same_bits(p.tensor, weight)
        values, wanted = expected(weight, master)
        assert_same_bits(m.tensor.cpu(), values)
        assert [count - 2**40 for count in found] == wanted


RUNS = {"kernel": adopt_, "reference": reference.adopt_, "compiled": compiled.adopt_}


@pytest.fixture(params=RUNS.values(), ids=RUNS)
def run(request):
    """The kernel, and the backends that it has to agree with: all against NumPy."""
    return request.param


@pytest.mark.parametrize("dtype", HALVES)
def test_adopt_of_all_65536_patterns_beside_masters_of_all_kinds(dtype, run, device):
    weight = all_patterns(dtype)
    masters = [weight.float(), near(weight, 1), random_bits(2**16, torch.float32, seed=2)]
    masters.append(torch.full((2**16,), torch.nan))
    assert_adopted([weight] * 4, masters, device, run=run)


@pytest.mark.parametrize("dtype", HALVES)
def test_adopt_beside_every_boundary_of_rounding(dtype, run, device):
    master = rounding_boundaries()
    weight = torch.from_numpy(rounded(master, dtype).view(np.int16).copy()).view(dtype)
    assert expected(weight, master)[1] == [0, 0]
    up = torch.from_numpy(weight.view(torch.int16).numpy() + np.int16(1)).view(dtype)
    assert_adopted([weight, up], [master, master], device, run=run)


@pytest.mark.parametrize("dtype", HALVES)
def test_adopt_keeps_the_sign_of_zeros_and_the_payload_of_masters(dtype, run, device):
    weight = torch.tensor([0.0, -0.0, 0.0, -0.0, torch.nan, torch.nan, 1.0], dtype=dtype)
    master = torch.tensor([0.0, -0.0, -0.0, 0.0, torch.nan, 1.0, torch.nan])
    assert_adopted([weight], [master], device, run=run)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_adopt_touches_a_tensor_of_any_size_and_nothing_around_it(dtype, size, device):
    weight = random_bits(size, dtype, seed=size)
    assert_adopted([weight], [near(weight, size)], device)


def test_adopt_takes_many_tensors_of_mixed_sizes_and_dtypes_in_one_call(device):
    shuffled = [SIZES[(3 * i) % len(SIZES)] for i in range(2 * len(SIZES))]
    weights = [random_bits(n, HALVES[i % 2], seed=i) for i, n in enumerate(shuffled)]
    assert_adopted(weights, [near(w, i) for i, w in enumerate(weights)], device)


@given(data=st.data(), weights=tensors(dtypes=tuple(HALVES)))
def test_adopt_of_any_bits(data, weights, device):
    masters = []
    for weight in weights:
        free = random_bits(weight.numel(), torch.float32, data.draw(st.integers(0, 99)))
        masters.append(free if data.draw(st.booleans()) else near(weight, 3))
    assert_adopted(weights, masters, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 7])
def test_adopt_handles_views_that_are_not_aligned(dtype, offset, device):
    weights = [random_bits(2 * CHUNK + 9, dtype, seed=i) for i in range(2)]
    masters = [near(weight, 5) for weight in weights]
    assert_adopted(weights, masters, device, offsets=[offset, 0])
    assert_adopted(weights, masters, device, master_offsets=[0, offset])


@pytest.mark.parametrize("places", [[0], [CHUNK - 1], [CHUNK], [CHUNK + ROUND], [2 * CHUNK + 2]])
def test_adopt_finds_a_single_element_of_a_chunk(places, device):
    master = torch.full((2 * CHUNK + 3,), 1 + 2.0**-20)
    weight = master.half()
    weight[places] = 2.0
    assert_adopted([weight], [master], device)
    weight[places] = torch.inf
    assert_adopted([weight], [master], device)


def test_adopt_counts_a_chunk_that_is_refused_altogether(device):
    weight = torch.full((CHUNK,), torch.inf).half()
    assert_adopted([weight], [torch.zeros(CHUNK)], device)


def test_adopt_of_empty_lists_does_nothing(device):
    adopt_([], [], torch.zeros(0, 2, dtype=torch.int64, device=device))


def test_adopt_tells_autograd_what_it_wrote_and_nothing_else(device):
    weight = torch.ones(2, dtype=torch.float16, device=device)
    master = torch.zeros(2, device=device)
    counts = torch.zeros(1, 2, dtype=torch.int64, device=device)
    versions = weight._version, master._version, counts._version
    adopt_([weight], [master], counts)
    assert weight._version == versions[0]
    assert master._version > versions[1]
    assert counts._version > versions[2]


def test_adopt_refuses_what_it_cannot_write(device):
    weight = torch.ones(4, dtype=torch.float16, device=device)
    master = torch.zeros(4, device=device)
    counts = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected torch.float16 or torch.bfloat16"):
        adopt_([master], [master.clone()], counts)
    with pytest.raises(ValueError, match=r"masters\[0\]: expected torch.float32"):
        adopt_([weight], [weight.clone()], counts)
    with pytest.raises(ValueError, match=r"counts: expected a contiguous .* of shape \[2, 2\]"):
        adopt_([weight] * 2, [master] * 2, counts)
    with pytest.raises(ValueError, match=r"masters\[1\]: expected memory of its own"):
        adopt_([weight, weight], [master, master], counts.repeat(2, 1))
    with pytest.raises(ValueError, match=r"masters\[0\]: expected the layout of weights"):
        adopt_([weight.view(2, 2)], [master.view(2, 2).t()], counts)
    assert not master.any()
    assert not counts.any()


def test_the_launcher_adopts_what_the_function_adopts_call_after_call(device):
    launcher = Launcher()
    weight = torch.ones(5, dtype=torch.float16, device=device)
    master = torch.full((5,), 1 + 2.0**-20, device=device)
    counts = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for value in (1.0, 3.0, 3.0, torch.nan):
        weight[2] = value
        launcher.adopt_([weight], [master], counts)
    assert counts.tolist() == [[1, 1]]
    assert master.tolist() == [1 + 2.0**-20] * 2 + [3.0] + [1 + 2.0**-20] * 2
