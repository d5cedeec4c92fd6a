"""unscale_ and unscale_into against `grad.float() * coefficient` in plain PyTorch."""

import pytest
import torch
from hypothesis import given

from mpcore_kernels import unscale_, unscale_into
from mpcore_kernels._table import CHUNK, ROUND
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    SIZES,
    all_patterns,
    assert_same_bits,
    flags,
    guarded,
    random_bits,
    random_finite,
)
from mpcore_testing.lengths import few_of
from mpcore_testing.strategies import float32_bits, tensors

# of loss scales and of their reciprocals, from 2^-14 to 2^24
POWERS = range(-24, 25)


def scalar(value, device):
    return torch.tensor(value, dtype=torch.float32, device=device)


def product(grad, coefficient):
    return grad.float() * torch.tensor(coefficient, dtype=torch.float32)


def run_in_place(values, coefficient, device, offsets=None):
    """Runs unscale_ on guarded copies; returns results and flags."""
    offsets = offsets or [0] * len(values)
    placed = [guarded(v, device, o) for v, o in zip(values, offsets, strict=True)]
    nonfinite = flags(len(values), device)
    unscale_([p.tensor for p in placed], scalar(coefficient, device), nonfinite)
    for p in placed:
        p.assert_margins_intact()
    return [p.tensor.cpu() for p in placed], nonfinite.tolist()


def run_into(values, coefficient, device, offsets=None, out_offsets=None):
    """Runs unscale_into on guarded copies; returns results and flags."""
    zeros = [0] * len(values)
    placed = [guarded(v, device, o) for v, o in zip(values, offsets or zeros, strict=True)]
    blanks = [torch.full((v.numel(),), 777.0) for v in values]
    outs = [guarded(b, device, o) for b, o in zip(blanks, out_offsets or zeros, strict=True)]
    nonfinite = flags(len(values), device)
    unscale_into(
        [p.tensor for p in placed], [o.tensor for o in outs], scalar(coefficient, device), nonfinite
    )
    for p, v in zip(placed, values, strict=True):
        p.assert_margins_intact()
        assert_same_bits(p.tensor, v)
    for o in outs:
        o.assert_margins_intact()
    return [o.tensor.cpu() for o in outs], nonfinite.tolist()


def assert_in_place(values, coefficient, device, offsets=None):
    results, nonfinite = run_in_place(values, coefficient, device, offsets)
    expected = [product(v, coefficient).to(v.dtype) for v in values]
    for result, e in zip(results, expected, strict=True):
        assert_same_bits(result, e)
    assert nonfinite == [int(not e.isfinite().all()) for e in expected]


def assert_into(values, coefficient, device, offsets=None, out_offsets=None):
    results, nonfinite = run_into(values, coefficient, device, offsets, out_offsets)
    expected = [product(v, coefficient) for v in values]
    for result, e in zip(results, expected, strict=True):
        assert_same_bits(result, e)
    assert nonfinite == [int(not e.isfinite().all()) for e in expected]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_unscale_touches_a_tensor_of_any_size_and_nothing_around_it(dtype, size, device):
    assert_in_place([random_finite(size, dtype, seed=size)], 0.37, device)
    assert_into([random_finite(size, dtype, seed=size)], 0.37, device)


def test_unscale_takes_many_tensors_of_mixed_sizes_and_dtypes_in_one_call(device):
    shuffled = [SIZES[(3 * i) % len(SIZES)] for i in range(3 * len(SIZES))]
    values = [random_bits(n, FLOATS[i % 3], seed=i) for i, n in enumerate(shuffled)]
    assert_in_place(values, 2.0**-7, device)
    assert_into(values, 2.0**-7, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("power", few_of(POWERS, POWERS[::6]))
def test_unscale_multiplies_all_65536_patterns_as_torch_does(dtype, power, device):
    assert_in_place([all_patterns(dtype)], 2.0**power, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("power", few_of(POWERS, POWERS[::6]))
def test_unscale_into_multiplies_all_65536_patterns_as_torch_does(dtype, power, device):
    assert_into([all_patterns(dtype)], 2.0**power, device)


@given(values=tensors(), bits=float32_bits())
def test_unscale_is_one_rounded_product_for_any_bits(values, bits, device):
    coefficient = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
    assert_in_place(values, coefficient, device)


@given(values=tensors(), bits=float32_bits())
def test_unscale_into_is_one_product_for_any_bits(values, bits, device):
    coefficient = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
    assert_into(values, coefficient, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 7])
def test_unscale_handles_views_that_are_not_aligned(dtype, offset, device):
    size = 2 * CHUNK + 9
    values = [random_finite(size, dtype, seed=offset), random_finite(size, dtype, seed=0)]
    assert_in_place(values, 0.37, device, offsets=[offset, 0])
    assert_into(values, 0.37, device, offsets=[offset, 0])
    assert_into(values, 0.37, device, out_offsets=[0, offset])


BORDERS = [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 9]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_flags_one_bad_value_anywhere_in_its_own_tensor_only(dtype, bad, device):
    # one tensor per position, clean neighbours between them, all in one launch
    values = [random_finite(2 * CHUNK + 10, dtype, seed=0) for _ in range(2 * len(BORDERS))]
    for i, position in enumerate(BORDERS):
        values[2 * i][position] = bad
    for run in (run_in_place, run_into):
        _, nonfinite = run(values, 2.0**-3, device)
        assert nonfinite == [1, 0] * len(BORDERS)


ROUND_BORDERS = [0, ROUND - 1, ROUND, 2 * ROUND - 1, CHUNK - 1, CHUNK, CHUNK + ROUND, CHUNK + 1299]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_flags_a_bad_value_in_every_round_of_a_masked_body(dtype, offset, device):
    # the second chunk is masked, and with an offset both are
    values = [random_finite(CHUNK + 1300, dtype, seed=1) for _ in range(2 * len(ROUND_BORDERS))]
    for i, position in enumerate(ROUND_BORDERS):
        values[2 * i][position] = torch.nan
    offsets = [offset] * len(values)
    _, nonfinite = run_in_place(values, 0.5, device, offsets)
    assert nonfinite == [1, 0] * len(ROUND_BORDERS)
    _, nonfinite = run_into(values, 0.5, device, offsets)
    assert nonfinite == [1, 0] * len(ROUND_BORDERS)


def test_unscale_writes_its_flags_and_none_beside_them(device):
    buffer = torch.full((11,), -5, dtype=torch.int32, device=device)
    buffer[4:7] = 0
    grads = [torch.full((3,), v, device=device) for v in (torch.inf, 1.0, torch.nan)]
    unscale_(grads, scalar(0.5, device), buffer[4:7])
    assert buffer.tolist() == [-5] * 4 + [1, 0, 1] + [-5] * 4


@pytest.mark.exhaustive
def test_unscale_takes_20000_tensors(device):
    values = [torch.full((1 + i % 3,), 1.0 + i % 7, dtype=FLOATS[i % 3]) for i in range(20_000)]
    values[0][0] = values[19_999][0] = torch.nan
    grads = [value.to(device, copy=True) for value in values]
    nonfinite = flags(20_000, device)
    unscale_(grads, scalar(0.5, device), nonfinite)
    assert nonfinite.tolist() == [1] + [0] * 19_998 + [1]
    assert_same_bits(torch.cat(grads[::3]), torch.cat(values[::3]) / 2)
    assert_same_bits(torch.cat(grads[1::3]), torch.cat(values[1::3]) / 2)
    assert_same_bits(torch.cat(grads[2::3]), torch.cat(values[2::3]) / 2)


@pytest.mark.parametrize("coefficient", [2.0**-16, 0.37, 1.0, 256.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_invents_no_flag(dtype, coefficient, device):
    values = [random_finite(size, dtype, seed=size) / 4 for size in SIZES]
    for run in (run_in_place, run_into):
        _, nonfinite = run(values, coefficient, device)
        assert nonfinite == [0] * len(SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unscale_flags_a_product_that_overflows_when_the_scale_is_below_one(dtype, device):
    values = [torch.tensor([2.0, 3e38], dtype=dtype), torch.tensor([2.0, 1e38], dtype=dtype)]
    for run in (run_in_place, run_into):
        _, nonfinite = run(values, 2.0, device)
        assert nonfinite == [1, 0]


def test_unscale_flags_an_overflow_made_by_the_last_rounding(device):
    values = [torch.tensor([40000.0]).half(), torch.tensor([32752.0]).half()]
    results, nonfinite = run_in_place(values, 2.0, device)
    assert [r.item() for r in results] == [float("inf"), 65504.0]
    assert nonfinite == [1, 0]
    # FP32 holds the product
    results, nonfinite = run_into(values, 2.0, device)
    assert [r.item() for r in results] == [80000.0, 65504.0]
    assert nonfinite == [0, 0]


@pytest.mark.parametrize("coefficient", [float("inf"), float("nan")])
def test_unscale_flags_every_tensor_with_elements_when_the_coefficient_is_not_finite(
    coefficient, device
):
    values = [torch.ones(3), torch.ones(0), torch.zeros(5).half()]
    for run in (run_in_place, run_into):
        _, nonfinite = run(values, coefficient, device)
        assert nonfinite == [1, 0, 1]


def test_unscale_never_clears_a_flag(device):
    grads = [torch.ones(3, device=device), torch.ones(3, device=device)]
    nonfinite = torch.tensor([0, 1], dtype=torch.int32, device=device)
    unscale_(grads, scalar(0.5, device), nonfinite)
    assert nonfinite.tolist() == [0, 1]


def test_unscale_reads_a_coefficient_that_is_a_view_at_any_offset(device):
    coefficients = torch.arange(1.0, 6.0, device=device)
    for i in range(5):
        out = torch.empty(1, device=device)
        unscale_into([torch.ones(1, device=device)], [out], coefficients[i], flags(1, device))
        assert out.item() == i + 1


def test_unscale_of_empty_lists_does_nothing(device):
    unscale_([], scalar(0.5, device), flags(0, device))
    unscale_into([], [], scalar(0.5, device), flags(0, device))


def layouts(dtype, device):
    base = random_finite(2 * 3 * 4 * 5, dtype, seed=3).to(device).view(2, 3, 4, 5)
    yield base.clone(memory_format=torch.channels_last)
    yield base.clone().permute(3, 0, 2, 1)
    yield base[0, 0].clone().t()
    yield base[0, 0, 0, 0].clone()
    # transposed, and with a stride that no element is reached by
    odd = torch.empty_strided((1, 3, 4), (999, 1, 3), dtype=dtype, device=device)
    yield odd.copy_(base[0, 0, :3, :4])


@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_keeps_the_order_of_dimensions_of_dense_tensors(dtype, device):
    for grad in layouts(dtype, device):
        before = grad.cpu().clone()
        out = torch.empty_like(grad, dtype=torch.float32)
        unscale_into([grad], [out], scalar(0.37, device), flags(1, device))
        assert_same_bits(out, product(before, 0.37))
        unscale_([grad], scalar(0.37, device), flags(1, device))
        assert_same_bits(grad, product(before, 0.37).to(dtype))


def test_unscale_tells_autograd_what_it_wrote(device):
    grads = [torch.ones(3, device=device), torch.ones(0, device=device)]
    nonfinite = flags(2, device)
    versions = [tensor._version for tensor in (*grads, nonfinite)]
    unscale_(grads, scalar(0.5, device), nonfinite)
    assert all(t._version > v for t, v in zip((*grads, nonfinite), versions, strict=True))


def test_unscale_into_tells_autograd_what_it_wrote_and_nothing_else(device):
    grad, out = torch.ones(3, device=device), torch.ones(3, device=device)
    nonfinite, coefficient = flags(1, device), scalar(0.5, device)
    grad_version, out_version = grad._version, out._version
    unscale_into([grad], [out], coefficient, nonfinite)
    assert out._version > out_version
    assert (grad._version, coefficient._version) == (grad_version, 0)
    assert nonfinite._version > 0
