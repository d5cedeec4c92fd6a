"""Unscale and cast of the cpu backend, bit for bit against whole-tensor operations of torch."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import Backend, cpu, reference
from mpcore.backends._blocks import CHUNK

from mpcore_testing.bits import rounded
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    assert_same_bits,
    flags,
    random_bits,
    random_finite,
    rounding_boundaries,
)
from mpcore_testing.strategies import float32_bits, tensors

SIZES = [0, 1, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37]
NOTHING = torch.zeros((), dtype=torch.int32)


def number(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def none_yet():
    return torch.tensor(5, dtype=torch.int64)


def assert_unscaled(values, coefficient):
    """Checks `unscale_into`, then `unscale_`, which overwrites `values`."""
    expected = [value.float() * coefficient for value in values]
    before = [value.clone() for value in values]
    outs = [torch.full_like(product, 3.0) for product in expected]
    raised = flags(len(values), "cpu")
    cpu.unscale_into(values, outs, coefficient, raised)
    for actual, product in zip([*outs, *values], [*expected, *before], strict=True):
        assert_same_bits(actual, product)
    assert raised.tolist() == [int(not bool(p.isfinite().all())) for p in expected]
    expected = [product.to(v.dtype) for product, v in zip(expected, values, strict=True)]
    raised = flags(len(values), "cpu")
    cpu.unscale_(values, coefficient, raised)
    for actual, product in zip(values, expected, strict=True):
        assert_same_bits(actual, product)
    assert raised.tolist() == [int(not bool(p.isfinite().all())) for p in expected]


def assert_cast(masters, dtypes):
    expected = [rounded(m, dtype) for m, dtype in zip(masters, dtypes, strict=True)]
    clamps = [
        int((m.to(dtype).isinf() & m.isfinite()).sum())
        for m, dtype in zip(masters, dtypes, strict=True)
    ]
    weights = [torch.full_like(m, 2.0, dtype=d) for m, d in zip(masters, dtypes, strict=True)]
    count = none_yet()
    cpu.cast_into(masters, weights, NOTHING, count)
    for weight, value in zip(weights, expected, strict=True):
        assert_same_bits(weight, value)
    assert count.item() == 5 + sum(clamps)


FUNCTIONS = [name for name, value in vars(Backend).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("_")])
def test_the_cpu_backend_has_the_signatures_of_the_reference_backend(name):
    actual, expected = (inspect.signature(getattr(b, name)) for b in (cpu, reference))
    assert list(actual.parameters) == list(expected.parameters)
    for one, other in zip(actual.parameters.values(), expected.parameters.values(), strict=True):
        assert (one.kind, one.default) == (other.kind, other.default)


@given(values=tensors(), bits=float32_bits())
def test_unscale_any_bits(values, bits):
    assert_unscaled(values, number(bits))


@given(values=tensors(dtypes=(torch.float32,)), bits=float32_bits())
def test_unscale_float32_of_any_bits(values, bits):
    assert_unscaled(values, number(bits))


@pytest.mark.parametrize("dtypes", [FLOATS, [torch.float32]])
@pytest.mark.parametrize("coefficient", [1.0, -1.0, 2.0**-10, 0.37, 3.0, -3.0, 0.0, float("inf")])
def test_unscale_every_remainder_of_a_chunk(coefficient, dtypes):
    for make in (random_bits, random_finite):
        values = [make(n, dtypes[i % len(dtypes)], seed=i) for i, n in enumerate(SIZES)]
        assert_unscaled(values, torch.tensor(coefficient))
    assert_unscaled([torch.full((3,), -3e38), torch.ones(2)], torch.tensor(coefficient))


def test_one_overflow_in_the_last_chunk_flags_its_tensor_alone():
    values = [torch.ones(70), torch.ones(2 * CHUNK), torch.ones(70)]
    values[1][-1] = torch.inf
    raised = flags(3, "cpu")
    raised[2] = 1
    cpu.unscale_(values, torch.tensor(0.5), raised)
    assert raised.tolist() == [0, 1, 1]  # raised, never cleared


def dense_layouts(dtype):
    base = random_bits(3 * 8 * 5 * 7, dtype, seed=1).view(3, 8, 5, 7)
    permuted = base.clone().permute(3, 0, 2, 1)
    return [base.to(memory_format=torch.channels_last), permuted, base[:1]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_any_layout(dtype):
    base = random_bits(240, dtype, seed=2)
    gaps = [base.clone()[::2], base.clone().view(12, 20)[:, 3:9], base.clone().view(12, 20).t()]
    for values in (dense_layouts(dtype), gaps):
        assert_unscaled(values, torch.tensor(0.37))


def test_unscale_into_another_layout():
    grad = random_finite(48, torch.float16, seed=3).view(6, 8)
    for out in (torch.empty(8, 6).t(), torch.empty(6, 16)[:, ::2]):
        cpu.unscale_into([grad], [out], torch.tensor(0.37), flags(1, "cpu"))
        assert_same_bits(out.contiguous(), grad.float() * torch.tensor(0.37))


def test_unscale_refuses_memory_that_overlaps_itself():
    with pytest.raises(RuntimeError, match="single memory location"):
        cpu.unscale_([torch.ones(1).expand(4)], torch.tensor(0.5), flags(1, "cpu"))


def test_float64_is_computed_in_float64():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, dtype=torch.float64, generator=generator)
    values[:2] = torch.tensor([1e300, -1e-300], dtype=torch.float64)
    coefficient = torch.tensor(0.37)
    expected = values * coefficient.double()
    for out in (torch.empty(300), torch.empty(300, dtype=torch.float64)):
        raised = flags(1, "cpu")
        cpu.unscale_into([values], [out], coefficient, raised)
        assert torch.equal(out, expected.to(out.dtype))
        assert raised.item() == int(out.dtype == torch.float32)
    raised = flags(2, "cpu")
    grads = [values.clone(), torch.full((3,), 2.0)]
    cpu.unscale_(grads, coefficient, raised)
    assert torch.equal(grads[0], expected)
    assert torch.equal(grads[1], torch.full((3,), 2.0) * coefficient)
    assert raised.tolist() == [0, 0]


def test_a_product_is_rounded_to_float32_whatever_holds_it():
    grad, coefficient = random_finite(300, torch.bfloat16, seed=4), torch.tensor(0.37)
    out = torch.empty(300, dtype=torch.float64)
    cpu.unscale_into([grad], [out], coefficient, flags(1, "cpu"))
    assert torch.equal(out, (grad.float() * coefficient).double())


@given(masters=tensors(dtypes=(torch.float32,)), data=st.data())
def test_cast_any_bits(masters, data):
    assert_cast(masters, [data.draw(st.sampled_from(HALVES)) for _ in masters])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("make", [random_bits, random_finite])
def test_cast_every_remainder_of_a_chunk(dtype, make):
    assert_cast([make(n, torch.float32, seed=n) for n in SIZES], [dtype] * len(SIZES))


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_rounding_boundaries(dtype):
    assert_cast([rounding_boundaries()], [dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("sizes", [[2 * CHUNK + 37], [100, 3, 100]])
def test_one_master_beyond_the_largest_weight_is_clamped_and_counted(dtype, sign, sizes):
    # halfway between the largest finite value and the next one rounds to infinity
    largest, eps = torch.finfo(dtype).max, torch.finfo(dtype).eps
    halfway = largest / (2 - eps) * (2 - eps / 2)
    for value, clamps in [(halfway, 1), (largest, 0)]:
        masters = [torch.full((size,), 1e-3) for size in sizes]
        masters[-1][-1] = sign * value
        weights, count = [m.to(dtype) for m in masters], none_yet()
        cpu.cast_into(masters, weights, NOTHING, count)
        assert weights[-1][-1].item() == sign * largest
        assert count.item() == 5 + clamps


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_any_layout(dtype):
    layouts = dense_layouts(torch.float32)
    assert_cast(layouts, [dtype] * len(layouts))
    master = random_finite(48, torch.float32, seed=3).view(6, 8)
    for weight in (torch.empty(8, 6, dtype=dtype).t(), torch.empty(6, 16, dtype=dtype)[:, ::2]):
        cpu.cast_into([master], [weight], NOTHING, none_yet())
        assert_same_bits(weight.contiguous(), master.to(dtype))


@pytest.mark.parametrize("master", [[1.0, 5.0], [1.0, 1e6]])
def test_a_skipped_cast_writes_and_counts_nothing(master):
    weight, count = torch.full((2,), 2.0).half(), none_yet()
    cpu.cast_into([torch.tensor(master)], [weight], torch.tensor(1, dtype=torch.int32), count)
    assert weight.tolist() == [2.0, 2.0]
    assert count.item() == 5
