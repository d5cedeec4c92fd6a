"""inspect against NumPy in float64: what is not finite, and where; norms; the clip."""

import math

import numpy
import pytest
import torch
from hypothesis import given

from mpcore_kernels import inspect
from mpcore_kernels._table import CHUNK
from mpcore_testing.inspections import assert_inspection, assert_same_inspection, ulps_between
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    SIZES,
    all_patterns,
    assert_same_bits,
    guarded,
    random_bits,
    random_finite,
)
from mpcore_testing.strategies import float32_bits, tensors

BORDERS = [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 9]


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def run(values, coefficient, device, max_norm=None, offsets=None):
    """Runs inspect on guarded copies, which it must leave alone."""
    offsets = offsets or [0] * len(values)
    placed = [guarded(v, device, o) for v, o in zip(values, offsets, strict=True)]
    found = inspect([p.tensor for p in placed], scalar(coefficient, device), max_norm)
    for p, v in zip(placed, values, strict=True):
        p.assert_margins_intact()
        assert_same_bits(p.tensor, v)
    return found


@pytest.mark.parametrize("coefficient", [2.0**-24, 2.0**-16, 0.37, 1.0, 2.0**14])
@pytest.mark.parametrize("dtype", HALVES)
def test_inspect_finds_what_all_65536_patterns_hold(dtype, coefficient, device):
    patterns = all_patterns(dtype)
    finite = patterns[patterns.isfinite()]
    values = [patterns, finite, patterns[patterns.isnan()], torch.tensor([torch.inf], dtype=dtype)]
    assert_inspection(run(values, coefficient, device), values, coefficient)


@given(bits=float32_bits(), values=tensors(max_tensors=2))
def test_inspect_takes_the_reciprocal_of_what_is_inverted(bits, values, device):
    scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    quotient = torch.from_numpy(numpy.asarray(numpy.float32(1) / scale.numpy()))
    grads = [value.to(device) for value in values]
    found = inspect(grads, scale.to(device), 1.0, inverted=True)
    assert_same_bits(found.unscale, quotient)
    assert_same_inspection(found, inspect(grads, quotient.to(device), 1.0))


@pytest.mark.parametrize("dtype", HALVES)
def test_inspect_tells_nans_and_both_infinities_apart_among_all_patterns(dtype, device):
    # a tensor each for some 60 of the non-finite patterns, among them infinities and extreme NaNs
    patterns = all_patterns(dtype)
    bad = patterns[~patterns.isfinite()].view(2, -1)
    step = max(1, bad.shape[1] // 30)
    bad = torch.cat([bad[:, :1], bad[:, 1::step], bad[:, -1:]], dim=1).flatten()
    values = [torch.ones(5, dtype=dtype) for _ in bad]
    for value, pattern in zip(values, bad, strict=True):
        value[3] = pattern
    found = run(values, 0.5, device)
    kinds = [1 if p.isnan() else 2 if p > 0 else 4 for p in bad]
    assert {1, 2, 4} == set(kinds)
    assert found.kinds.tolist() == kinds
    assert found.first_bad.tolist() == [3] * len(kinds)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_inspect_reads_a_tensor_of_any_size_and_nothing_around_it(dtype, size, device):
    values = [random_finite(size, dtype, seed=size)]
    assert_inspection(run(values, 0.37, device), values, 0.37)


@pytest.mark.parametrize("make", [random_bits, random_finite])
def test_inspect_takes_many_tensors_of_mixed_sizes_and_dtypes_in_one_call(make, device):
    shuffled = [SIZES[(3 * i) % len(SIZES)] for i in range(2 * len(SIZES))]
    values = [make(n, FLOATS[i % 3], seed=i) for i, n in enumerate(shuffled)]
    assert_inspection(run(values, 2.0**-7, device), values, 2.0**-7)


@given(values=tensors(), bits=float32_bits())
def test_inspect_finds_what_any_bits_hold(values, bits, device):
    coefficient = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
    assert_inspection(run(values, coefficient, device), values, coefficient)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 7])
def test_inspect_handles_views_that_are_not_aligned(dtype, offset, device):
    size = 2 * CHUNK + 9
    values = [random_finite(size, dtype, seed=offset), random_finite(size, dtype, seed=0)]
    values[0][CHUNK + 1] = torch.nan
    found = run(values, 0.37, device, offsets=[offset, 0])
    assert_inspection(found, values, 0.37)
    aligned = run(values, 0.37, device)
    assert torch.equal(found.square_sum[1], aligned.square_sum[1])


@pytest.mark.parametrize(("bad", "kind"), [("nan", 1), ("inf", 2), ("-inf", 4)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_inspect_finds_one_bad_value_anywhere_in_its_own_tensor_only(dtype, bad, kind, device):
    # one tensor per position, clean neighbours between them, all in one launch
    values = [random_finite(2 * CHUNK + 10, dtype, seed=0) for _ in range(2 * len(BORDERS))]
    for i, position in enumerate(BORDERS):
        values[2 * i][position] = float(bad)
    found = run(values, 2.0**-3, device)
    assert found.kinds.tolist() == [kind, 0] * len(BORDERS)
    assert found.first_bad.tolist() == [place for b in BORDERS for place in (b, -1)]
    assert found.found_inf.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inspect_finds_a_product_that_overflows_at_every_border(dtype, device):
    values = [torch.ones(2 * CHUNK + 10, dtype=dtype) for _ in BORDERS]
    for value, position in zip(values, BORDERS, strict=True):
        value[position] = -3e38
    found = run(values, 2.0, device)
    assert found.kinds.tolist() == [8] * len(BORDERS)
    assert found.first_bad.tolist() == BORDERS
    assert found.largest.tolist() == [2.0] * len(BORDERS)


def test_inspect_unites_kinds_over_chunks_and_keeps_the_first_place(device):
    value = torch.ones(3 * CHUNK)
    value[3 * CHUNK - 1], value[2 * CHUNK], value[CHUNK + 5] = torch.nan, -torch.inf, torch.inf
    value[CHUNK + 9] = 3e38
    found = run([torch.ones(CHUNK), value], 2.0, device)
    assert found.kinds.tolist() == [0, 15]
    assert found.first_bad.tolist() == [-1, CHUNK + 5]
    assert math.isnan(found.grad_norm.item())


@pytest.mark.parametrize("coefficient", [float("inf"), float("nan")])
def test_inspect_blames_only_elements_when_the_coefficient_is_not_finite(coefficient, device):
    values = [torch.full((3,), torch.nan), torch.ones(0), torch.zeros(5).half()]
    found = run(values, coefficient, device)
    assert found.kinds.tolist() == [1, 0, 8]
    assert found.first_bad.tolist() == [0, -1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inspect_squares_no_finite_value_to_infinity(dtype, device):
    values = [torch.full((CHUNK + 5,), 3e38, dtype=dtype), torch.full((9,), 1e-38, dtype=dtype)]
    found = run(values, 1.0, device, max_norm=1.0)
    assert_inspection(found, values, 1.0)
    assert found.found_inf.item() == 0
    # the norm itself is beyond float32; the clip works with the float64
    assert found.grad_norm.item() == math.inf
    exact = math.sqrt(CHUNK + 5) * float(values[0][0])
    assert found.coefficient.item() == pytest.approx(1.0 / exact, rel=1e-5)
    assert_inspection(run(values, 2.0**-20, device), values, 2.0**-20)
    assert math.isfinite(run(values, 2.0**-20, device).grad_norm.item())


@pytest.mark.parametrize("exponent", range(-149, 128, 12))
def test_inspect_keeps_its_error_bound_at_every_magnitude(exponent, device):
    values = [random_finite(3000, torch.float16, seed=exponent + 200).float() / 256]
    values[0] = (values[0].double() * 2.0**exponent).float()
    assert_inspection(run(values, 1.0, device), values, 1.0)


def test_inspect_keeps_its_error_bound_beside_a_much_larger_value(device):
    # a float32 sum in order would lose every small square, and with them a third of the sum
    for large in (2.0**11, 2.0**12, 2.0**13):
        values = [torch.full((3 * CHUNK,), 0.75 * math.sqrt(large)), torch.full((CHUNK,), 1.0)]
        values[0][17] = large * 8
        assert_inspection(run(values, 1.0, device), values, 1.0)


def test_inspect_gives_the_same_bits_whatever_the_order_of_chunks(device):
    chunks = [random_finite(CHUNK, torch.float32, seed=i) * 2.0**i for i in range(4)]
    sums = {
        inspect([torch.cat([chunks[i] for i in order]).to(device)], scalar(1.0, device), None)
        .square_sum.cpu()
        .view(torch.int64)
        .item()
        for order in [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]
    }
    assert len(sums) == 1


def test_inspect_sums_a_group_of_four_in_the_documented_order(device):
    # (a + b) + (c + d) rounds differently from every other order of these squares
    place = 2.0**-23
    four = torch.tensor([1.0, 0.75 * place, 0.26 * place, 0.26 * place]).sqrt()
    s = (four * four).numpy()
    expected = (s[0] + s[1]) + (s[2] + s[3])
    others = {((s[0] + s[1]) + s[2]) + s[3], (s[0] + s[2]) + (s[1] + s[3])}
    others |= {(s[0] + s[3]) + (s[1] + s[2]), s[0] + (s[1] + (s[2] + s[3]))}
    assert expected not in others
    found = run([torch.cat([torch.zeros(4), four]) * 2.0**30], 1.0, device)
    assert found.square_sum.item() == float(expected) * 2.0**60


@pytest.mark.parametrize("max_norm", [None, 0.0, 1e-8, 0.1, 1.0, 1e30, math.inf])
def test_inspect_latches_the_coefficient_times_the_clip_factor(max_norm, device):
    values = [random_finite(5000, torch.float16, seed=1), torch.tensor([3.0])]
    found = run(values, 2.0**-3, device, max_norm=max_norm)
    norm = math.sqrt(math.fsum(found.square_sum.tolist()))
    limit = math.inf if max_norm is None else float(numpy.float32(max_norm))
    clip = min(1.0, limit / (norm + 1e-6))
    assert ulps_between(found.coefficient.item(), float(numpy.float32(0.125 * clip))) <= 1


def test_inspect_adds_a_millionth_to_the_norm_that_it_divides_by(device):
    found = run([torch.tensor([1e-6])], 1.0, device, max_norm=1e-6)
    assert found.coefficient.item() == pytest.approx(0.5, rel=1e-6)
    assert run([torch.zeros(3)], 1.0, device, max_norm=0.0).coefficient.item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inspect_clips_nothing_when_the_norm_is_not_finite(bad, device):
    found = run([torch.tensor([100.0, bad])], 0.5, device, max_norm=1.0)
    assert found.coefficient.item() == 0.5
    assert ulps_between(found.grad_norm.item(), abs(bad)) == 0


def test_inspect_of_nothing_finds_nothing(device):
    for grads in ([], [torch.ones(0, device=device)] * 2):
        found = inspect(grads, scalar(0.25, device), 1.0, statistics=True)
        assert (found.found_inf.item(), found.grad_norm.item()) == (0, 0.0)
        assert found.coefficient.item() == 0.25
        assert found.kinds.tolist() == [0] * len(grads)
        assert found.first_bad.tolist() == [-1] * len(grads)
        assert tuple(found.counts.shape) == (len(grads), 6)


def test_inspect_counts_places_in_the_order_of_memory(device):
    grad = torch.ones(2, 3, device=device).t()
    grad[2, 1] = torch.nan
    grad[1, 1] = torch.inf
    assert inspect([grad], scalar(1.0, device), None).first_bad.item() == 4


def test_inspect_writes_none_of_its_arguments(device):
    grad, coefficient = torch.ones(3, device=device), scalar(0.5, device)
    versions = grad._version, coefficient._version
    inspect([grad], coefficient, 0.1)
    assert (grad._version, coefficient._version) == versions
    assert coefficient.item() == 0.5


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_inspect_refuses_a_negative_limit(max_norm, device):
    with pytest.raises(ValueError, match="max_norm: expected a number of at least 0 or None"):
        inspect([], scalar(1.0, device), max_norm)


def test_inspect_refuses_gradients_that_it_cannot_read_by_address(device):
    one = scalar(1.0, device)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected torch.float16 or"):
        inspect([torch.ones(2, dtype=torch.float64, device=device)], one, None)
    with pytest.raises(ValueError, match=r"grads\[1\]: expected a dense tensor"):
        inspect([one, torch.ones(4, 4, device=device)[:, :2]], one, None)
    with pytest.raises(ValueError, match="coefficient: expected a contiguous"):
        inspect([], one.double(), None)


@pytest.mark.exhaustive
def test_inspect_takes_20000_tensors(device):
    values = [torch.full((1 + i % 3,), 1.0 + i % 7, dtype=FLOATS[i % 3]) for i in range(20_000)]
    values[19_999][0] = torch.nan
    grads = [value.to(device) for value in values]
    found = inspect(grads, scalar(1.0, device), None)
    assert found.kinds.tolist() == [0] * 19_999 + [1]
    sums = [v.double().square().sum().item() for v in values[:-1]]
    assert found.square_sum[:-1].tolist() == sums
