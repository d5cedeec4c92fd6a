"""inspect of the CPU backends: flags exactly as NumPy finds them, norms within 1e-6 of float64."""

import itertools
import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import compiled, cpu, reference
from mpcore.backends._blocks import CHUNK
from mpcore.errors import ArgumentError
from mpcore.updates import Batch, Hyper

from mpcore_testing.bits import same_bits
from mpcore_testing.inspections import (
    assert_same_inspection,
    expected_kinds,
    expected_square_sum,
    unscaled,
)
from mpcore_testing.kernels import FLOATS, HALVES, all_patterns, random_bits, random_finite
from mpcore_testing.strategies import float32_bits, tensors

SIZES = [0, 1, 63, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37]
ERROR = 1e-6

pytestmark = pytest.mark.parametrize("backend", [cpu, compiled], ids=["cpu", "compiled"])


def exact_square_sum(grad, coefficient):
    if grad.numel() <= 4096:
        return expected_square_sum(grad, coefficient)
    product = unscaled(grad, coefficient)
    if not numpy.isfinite(product).all():
        return math.nan if grad.isnan().any() else math.inf
    return float(numpy.sum(product * product))  # pairwise, in float64


def fast_kinds(grad, coefficient):
    """`expected_kinds` for long gradients: the value-by-value search runs over the bad ones."""
    bad = numpy.flatnonzero(~numpy.isfinite(unscaled(grad, coefficient)))
    if len(bad) == 0:
        return 0, -1
    kinds, _ = expected_kinds(grad[torch.from_numpy(bad)], coefficient)
    return kinds, int(bad[0])


def assert_close(actual, exact, error, smallest=2.0**-149):
    if math.isfinite(exact):
        # below the smallest normal float32 number a norm has fewer digits
        assert abs(actual - exact) <= error * exact + smallest
    else:
        assert actual == exact or (math.isnan(actual) and math.isnan(exact))


def assert_found(backend, grads, coefficient, max_norm=1.0):
    """Checks a call with 1-d gradients and a Python float that is a float32 number."""
    before = [grad.clone() for grad in grads]
    found = backend.inspect(grads, torch.tensor(coefficient), max_norm)
    for grad, copy in zip(grads, before, strict=True):
        assert torch.equal(grad.view(torch.uint8), copy.view(torch.uint8))
    expected = [fast_kinds(grad, coefficient) for grad in grads]
    assert found.kinds.tolist() == [kinds for kinds, _ in expected]
    assert found.first_bad.tolist() == [first for _, first in expected]
    overflow = any(kinds for kinds, _ in expected)
    assert found.found_inf.item() == int(overflow)
    sums = [exact_square_sum(grad, coefficient) for grad in grads]
    for actual, exact in zip(found.square_sum.tolist(), sums, strict=True):
        assert_close(actual, exact, 2 * ERROR, smallest=0.0)
    norm = math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else sum(sums)
    with numpy.errstate(over="ignore"):
        single = float(numpy.float32(norm))
    assert_close(found.grad_norm.item(), norm if math.isfinite(single) else single, ERROR)
    limit = math.inf if max_norm is None else float(numpy.float32(max_norm))
    clip = 1.0 if overflow else min(1.0, limit / (norm + 1e-6))
    assert_close(abs(found.coefficient.item()), abs(coefficient * clip), ERROR)
    if clip == 1.0 and limit > norm * (1 + ERROR):
        assert found.coefficient.item() == coefficient or math.isnan(coefficient)
    dtypes = (torch.int32, torch.int64, torch.float64, torch.int32, torch.float32, torch.float32)
    names = ("kinds", "first_bad", "square_sum", "found_inf", "grad_norm", "coefficient")
    assert tuple(getattr(found, name).dtype for name in names) == dtypes
    assert found.largest is found.counts is found.histogram is None
    return found


def float32(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


@given(
    values=tensors(),
    bits=float32_bits(),
    max_norm=st.one_of(st.none(), st.floats(min_value=0.0, width=32)),
)
def test_any_bits(backend, values, bits, max_norm):
    assert_found(backend, values, float32(bits), max_norm)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("exponent", [-126, -40, -14, 0, 3, 24, 126])
def test_all_patterns(backend, dtype, exponent):
    patterns = all_patterns(dtype)
    assert_found(backend, [patterns, patterns[patterns.isfinite()]], 2.0**exponent)


@pytest.mark.parametrize("coefficient", [2.0**-16, 1.0, -3.0, 2.0**80])
def test_every_remainder_of_a_chunk(backend, coefficient):
    for make in (random_bits, random_finite):
        assert_found(
            backend, [make(n, FLOATS[i % 3], seed=i) for i, n in enumerate(SIZES)], coefficient
        )


# squares of these leave the range of float32 on both sides
EXPONENTS = [-100, -35, -10, 0, 12, 63, 100]
MAGNITUDES = [(d, e) for d in FLOATS for e in EXPONENTS if d != torch.float16 or abs(e) < 14]


@pytest.mark.parametrize(("dtype", "exponent"), MAGNITUDES)
def test_norms_neither_overflow_nor_vanish(backend, dtype, exponent):
    values = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    grads = [(value * 2.0**exponent).to(dtype) for value in values]
    for coefficient in (2.0**-20, 1.0, 0.7499999403953552):
        found = assert_found(backend, grads, coefficient)
        assert found.found_inf.item() == 0
        assert found.grad_norm.item() > 0


def test_many_squares_that_vanish_count_beside_one_that_does_not(backend):
    grad = torch.full((CHUNK,), 2.0**-75)
    grad[7] = 2.0**-62
    assert_found(backend, [grad], 1.0)


@pytest.mark.parametrize("exponent", [-22, -20, -16, -10, 0])
def test_products_that_are_rounded_to_subnormal_numbers(backend, exponent):
    grad = torch.randn(4096, generator=torch.Generator().manual_seed(5)) * 2.0**exponent
    assert_found(backend, [grad], 2.0**-126)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1, 3.3, 1e-3, 7.7, 123.456])
def test_the_norm_of_equal_values_is_as_exact(backend, value):
    # every rounding error of a plain running sum goes the same way here
    for sizes in ([CHUNK], [CHUNK + 5 * 2**15, 300], [2**15, 2**16, 4096, 777]):
        assert_found(backend, [torch.full((size,), value) for size in sizes], 2.0**-10)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 36])
def test_one_bad_value_is_found_wherever_it_is(backend, dtype, bad, place):
    grads = [torch.full((n,), 0.01, dtype=dtype) for n in (100, 2 * CHUNK + 37, 100)]
    grads[1][place] = bad
    found = assert_found(backend, grads, 2.0**-10)
    assert found.first_bad.tolist() == [-1, place, -1]


def test_kinds_of_all_chunks_are_collected(backend):
    grad = torch.zeros(3 * CHUNK)
    grad[5], grad[CHUNK + 6], grad[2 * CHUNK + 7], grad[8] = 1e38, math.inf, -math.inf, -1e38
    found = assert_found(backend, [grad], 1e3)
    assert (found.kinds.item(), found.first_bad.item()) == (14, 5)
    grad[-1] = math.nan
    assert assert_found(backend, [grad], 1e3).kinds.item() == 15


@pytest.mark.parametrize("grads", [[], [torch.zeros(0)], [torch.zeros(3)], [torch.zeros(CHUNK)]])
@pytest.mark.parametrize("coefficient", [1.0, 0.0, math.inf, math.nan])
def test_nothing_and_zeros(backend, grads, coefficient):
    assert_found(backend, grads, coefficient)


@pytest.mark.parametrize("max_norm", [None, 0.0, 1e-3, 5.0, 5.1, math.inf])
def test_the_clip(backend, max_norm):
    found = assert_found(backend, [torch.tensor([6.0, 8.0]).half()], 0.5, max_norm)
    assert found.grad_norm.item() == 5.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_places_are_counted_in_the_order_of_memory(backend, dtype):
    memory = random_bits(3 * 8 * 5 * 7, dtype, seed=1)
    dense = memory.view(5, 7, 3, 8)
    for order in itertools.permutations(range(4)):
        found = backend.inspect([dense.permute(order)], torch.tensor(0.5), None)
        assert (found.kinds.item(), found.first_bad.item()) == expected_kinds(memory, 0.5)
    expanded = torch.tensor([1.0, 2.0]).to(dtype).expand(3, 2)
    assert backend.inspect([expanded], torch.tensor(1.0), None).square_sum.item() == 15.0
    # one element in memory, whose neighbours are not to be read
    single = torch.tensor([1.0, 2.0, 2.0, 2.0]).to(dtype)[0].expand(2, 2)
    assert backend.inspect([single], torch.tensor(1.0), None).square_sum.item() == 4.0


STATISTICS = ("largest", "counts", "histogram")


def assert_counted(backend, values, coefficient):
    """The statistics are the reference's, and all else is as without them."""
    found = backend.inspect(values, torch.tensor(coefficient), 1.0, statistics=True)
    expected = reference.inspect(values, torch.tensor(coefficient), 1.0, statistics=True)
    for name in STATISTICS:
        assert same_bits(getattr(found, name), getattr(expected, name)), name
    plain = backend.inspect(values, torch.tensor(coefficient), 1.0)
    assert_same_inspection(replace(found, **dict.fromkeys(STATISTICS)), plain)


@given(values=tensors(), bits=float32_bits())
def test_statistics_are_those_of_the_reference_backend(backend, values, bits):
    assert_counted(backend, values, float32(bits))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("coefficient", [1.0, 2.0**-16, 3.0, 2.0**120, -0.5, 0.0, math.inf])
def test_statistics_of_every_pattern_together_and_alone(backend, dtype, coefficient):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    if dtype == torch.float32:  # every exponent, both signs
        bits = bits.to(torch.int32) << 16 | 0x1234
    values = bits.view(dtype)
    finite = values[values.isfinite()]
    alone = [values[i * 997 : i * 997 + 1] for i in range(60)]
    assert_counted(
        backend, [values, finite, finite[:0], *alone, values.view(256, 256).t()], coefficient
    )


def test_the_same_bits_every_time_and_at_every_address(backend):
    values = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    first = backend.inspect(values, torch.tensor(0.3), 1.0)
    for shift in (1, 3, 8):
        moved = [torch.cat([torch.zeros(shift), value])[shift:] for value in values]
        assert_same_inspection(backend.inspect(moved, torch.tensor(0.3), 1.0), first)


@given(bits=float32_bits(), values=tensors(max_tensors=2), statistics=st.booleans())
def test_what_is_inverted_is_the_reciprocal(backend, bits, values, statistics):
    scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    quotient = torch.from_numpy(numpy.asarray(numpy.float32(1) / scale.numpy()))
    found = backend.inspect(values, scale, 1.0, inverted=True, statistics=statistics)
    assert same_bits(found.unscale.nan_to_num(7.0), quotient.nan_to_num(7.0))
    assert_same_inspection(found, backend.inspect(values, quotient, 1.0, statistics=statistics))


@pytest.mark.parametrize("statistics", [False, True])
def test_a_plan_is_prepared_on_the_way(backend, statistics):
    masters, moments = [torch.ones(3)], [[torch.zeros(3)], [torch.zeros(3)]]
    plan = backend.plan_update("adam", [Batch(masters, None, moments, [torch.zeros(())], [0])])
    hyper = Hyper(((0.5, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.0),), (None,))
    grads, one = [torch.ones(3)], torch.tensor(1.0)
    found = backend.inspect(grads, one, None, statistics=statistics, plan=plan, hyper=hyper)
    backend.update_(plan, [grads], one, found.found_inf, torch.tensor(0))
    assert torch.allclose(masters[0], torch.full((3,), 0.5))


def test_refusals(backend):
    one, grads = torch.tensor(1.0), [torch.ones(1), torch.ones(1, dtype=torch.float64)]
    with pytest.raises(ArgumentError, match=r"grads\[1\]: expected float16"):
        backend.inspect(grads, one, None)
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ArgumentError, match="max_norm: expected a number of at least 0"):
            backend.inspect(grads[:1], one, max_norm)
