"""cast_into against torch's own conversions and NumPy's."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcore_kernels import cast_into
from mpcore_kernels._table import CHUNK, ROUND
from mpcore_testing.kernels import (
    HALVES,
    SIZES,
    all_patterns,
    assert_same_bits,
    guarded,
    random_bits,
    random_finite,
    rounding_boundaries,
)
from mpcore_testing.strategies import tensors

LARGEST = {torch.float16: 65504.0, torch.bfloat16: (2.0**8 - 1) * 2.0**120}


def found(value, device):
    return torch.tensor(value, dtype=torch.int32, device=device)


def count(value, device):
    return torch.tensor(value, dtype=torch.int64, device=device)


def expected_weight(master, dtype):
    """The rounded, clamped master, and how many values were clamped."""
    rounded = master.to(dtype)
    clamped = rounded.isinf() & master.isfinite()
    largest = (master.sign() * LARGEST[dtype]).to(dtype)
    return torch.where(clamped, largest, rounded), int(clamped.sum())


def run(masters, dtypes, device, found_inf=0, offsets=None, weight_offsets=None):
    """Runs cast_into on guarded copies over weights of 3.0; returns weights and the count."""
    zeros = [0] * len(masters)
    placed = [guarded(m, device, o) for m, o in zip(masters, offsets or zeros, strict=True)]
    blanks = [torch.full_like(m, 3.0, dtype=d) for m, d in zip(masters, dtypes, strict=True)]
    weights = [guarded(b, device, o) for b, o in zip(blanks, weight_offsets or zeros, strict=True)]
    counts = torch.tensor([-5, 1000, -5], device=device)
    saturated = counts[1]
    cast_into(
        [p.tensor for p in placed], [w.tensor for w in weights], found(found_inf, device), saturated
    )
    for p, m in zip(placed, masters, strict=True):
        assert_same_bits(p.tensor, m)
        p.assert_margins_intact()
    for w in weights:
        w.assert_margins_intact()
    assert counts.tolist() == [-5, saturated.item(), -5]
    return [w.tensor.cpu() for w in weights], saturated.item() - 1000


def assert_cast(masters, dtypes, device, **offsets):
    weights, saturated = run(masters, dtypes, device, **offsets)
    expected = [expected_weight(m, d) for m, d in zip(masters, dtypes, strict=True)]
    for weight, (e, _) in zip(weights, expected, strict=True):
        assert_same_bits(weight, e)
    assert saturated == sum(clamped for _, clamped in expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_rounds_and_clamps_at_every_exponent_and_boundary(dtype, device):
    assert_cast([rounding_boundaries()], [dtype], device)


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_gives_back_every_weight_whose_master_is_its_own_value(dtype, device):
    (weight,), saturated = run([all_patterns(dtype).float()], [dtype], device)
    assert_same_bits(weight, all_patterns(dtype))
    assert saturated == 0


def test_cast_to_float16_rounds_as_numpy_does(device):
    masters = random_finite(30_000, torch.float32, seed=5)
    (weight,), _ = run([masters], [torch.float16], device)
    expected = masters.numpy().astype(numpy.float16)
    assert numpy.array_equal(weight.numpy().view(numpy.int16), expected.view(numpy.int16))


@given(masters=tensors(dtypes=(torch.float32,)), data=st.data())
def test_cast_rounds_and_clamps_any_bits(masters, data, device):
    dtypes = [data.draw(st.sampled_from(HALVES)) for _ in masters]
    assert_cast(masters, dtypes, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_cast_touches_a_tensor_of_any_size_and_nothing_around_it(dtype, size, device):
    assert_cast([random_bits(size, torch.float32, seed=size)], [dtype], device)


def test_cast_takes_many_tensors_of_mixed_sizes_and_dtypes_in_one_call(device):
    shuffled = [SIZES[(3 * i) % len(SIZES)] for i in range(2 * len(SIZES))]
    masters = [random_bits(n, torch.float32, seed=i) for i, n in enumerate(shuffled)]
    assert_cast(masters, [HALVES[i % 2] for i in range(len(masters))], device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 7])
def test_cast_handles_views_that_are_not_aligned(dtype, offset, device):
    masters = [random_bits(2 * CHUNK + 9, torch.float32, seed=i) for i in range(2)]
    assert_cast(masters, [dtype] * 2, device, offsets=[offset, 0])
    assert_cast(masters, [dtype] * 2, device, weight_offsets=[0, offset])


@pytest.mark.parametrize(
    ("dtype", "last_that_rounds_down"),
    [(torch.float16, 65519.996), (torch.bfloat16, 2.0**128 - 2.0**119 - 2.0**104)],
)
def test_cast_clamps_from_half_a_place_above_the_largest_value(
    dtype, last_that_rounds_down, device
):
    last = torch.tensor(last_that_rounds_down)
    bound = torch.nextafter(last, torch.tensor(float("inf")))
    (weight,), saturated = run([torch.stack([last, -last])], [dtype], device)
    assert weight.tolist() == [LARGEST[dtype], -LARGEST[dtype]]
    assert saturated == 0
    (weight,), saturated = run([torch.stack([bound, -bound])], [dtype], device)
    assert weight.tolist() == [LARGEST[dtype], -LARGEST[dtype]]
    assert saturated == 2


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_keeps_infinities_and_nans_visible_and_uncounted(dtype, device):
    master = torch.tensor([float("inf"), float("-inf"), float("nan")])
    (weight,), saturated = run([master], [dtype], device)
    assert_same_bits(weight, master.to(dtype))
    assert saturated == 0


@pytest.mark.parametrize("found_inf", [1, 2, -1, 2**31 - 1, -(2**31)])
def test_cast_writes_and_counts_nothing_when_found_inf_is_set(found_inf, device):
    masters = [torch.full((size,), 1e6) for size in SIZES]
    dtypes = [HALVES[i % 2] for i in range(len(masters))]
    weights, saturated = run(masters, dtypes, device, found_inf=found_inf)
    assert all((weight == 3.0).all() for weight in weights)
    assert saturated == 0


def test_cast_counts_clamped_values_over_all_chunks_tensors_and_dtypes(device):
    masters = [torch.zeros(3 * CHUNK), torch.zeros(5), torch.zeros(CHUNK + 1)]
    masters[0][[0, CHUNK - 1, CHUNK, 3 * CHUNK - 1]] = 7e4
    masters[1][4] = -7e4
    masters[2][CHUNK] = 3.4e38
    dtypes = [torch.float16, torch.float16, torch.bfloat16]
    assert run(masters, dtypes, device)[1] == 6


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", HALVES)
def test_cast_counts_clamped_values_in_every_round_of_a_masked_body(dtype, offset, device):
    # the second chunk is masked, and with an offset both are
    places = [0, ROUND - 1, ROUND, 2 * ROUND, CHUNK - 1, CHUNK, CHUNK + ROUND - 1, CHUNK + ROUND]
    for chosen in (places, places[3:4], places[-1:], range(CHUNK + 1300)):
        master = torch.zeros(CHUNK + 1300)
        master[list(chosen)] = -3.4e38
        assert_cast([master], [dtype], device, offsets=[offset])


@pytest.mark.exhaustive
def test_cast_takes_20000_tensors(device):
    masters = [torch.full((1 + i % 3,), 1.0 + i % 7, device=device) for i in range(20_000)]
    masters[19_999].fill_(-3.4e38)
    weights = [torch.empty_like(m, dtype=HALVES[i % 2]) for i, m in enumerate(masters)]
    saturated = count(0, device)
    cast_into(masters, weights, found(0, device), saturated)
    assert saturated.item() == masters[19_999].numel()
    for dtype in (0, 1):
        rounded = torch.cat(masters[dtype::2]).clamp(-LARGEST[HALVES[dtype]], 9.0)
        assert_same_bits(torch.cat(weights[dtype::2]), rounded.to(HALVES[dtype]))


def test_cast_adds_to_a_count_beyond_32_bits(device):
    saturated = count(2**40, device)
    weight = torch.empty(1, dtype=torch.float16, device=device)
    cast_into([torch.full((1,), 1e6, device=device)], [weight], found(0, device), saturated)
    assert saturated.item() == 2**40 + 1


def test_cast_of_empty_lists_does_nothing(device):
    saturated = count(7, device)
    cast_into([], [], found(0, device), saturated)
    assert saturated.item() == 7


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_keeps_the_order_of_dimensions_of_dense_tensors(dtype, device):
    base = random_finite(2 * 3 * 4 * 5, torch.float32, seed=3).view(2, 3, 4, 5)
    channels_last = base.clone(memory_format=torch.channels_last)
    for host in (channels_last, base.permute(3, 0, 2, 1), base[0, 0].t(), base[0, 0, 0, 0]):
        master = host.clone(memory_format=torch.preserve_format).to(device)
        weight = torch.empty_like(master, dtype=dtype)
        cast_into([master], [weight], found(0, device), count(0, device))
        assert_same_bits(weight, host.to(dtype))


def test_cast_tells_autograd_what_it_wrote_and_nothing_else(device):
    master = torch.ones(2, device=device)
    weight = torch.ones(2, dtype=torch.float16, device=device)
    saturated, found_inf = count(0, device), found(0, device)
    master_version, weight_version = master._version, weight._version
    cast_into([master], [weight], found_inf, saturated)
    assert weight._version > weight_version
    assert saturated._version > 0
    assert (master._version, found_inf._version) == (master_version, 0)


def test_backward_through_a_graph_from_before_the_cast_raises(device):
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16, device=device))
    loss = (weight * weight).sum()
    master = torch.full((2,), 5.0, device=device)
    cast_into([master], [weight], found(0, device), count(0, device))
    assert weight.tolist() == [5.0, 5.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
