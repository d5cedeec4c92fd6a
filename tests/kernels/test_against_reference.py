"""The Triton backend against the reference backend, bit for bit (invariant 11)."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import Backend, ScaleMove, reference
from mpcore.loss_scale import LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors

import mpcore_kernels
from mpcore_kernels._table import CHUNK
from mpcore_testing.inspections import assert_same_inspection
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    SIZES,
    all_patterns,
    assert_same_bits,
    flags,
    random_bits,
    random_finite,
)
from mpcore_testing.lengths import few_of, in_turn
from mpcore_testing.strategies import float32_bits, tensors


def any_float(bits, device):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)


def copies(values, device):
    return [value.to(device, copy=True) for value in values]


def assert_all_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


FUNCTIONS = [name for name in mpcore_kernels.__all__ if name[0].islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backends_share_names_and_signatures(name):
    expected = inspect.signature(getattr(reference, name))
    assert inspect.signature(getattr(mpcore_kernels.Launcher(), name)) == expected
    function = inspect.signature(getattr(mpcore_kernels, name))
    parameters = [p for p in function.parameters.values() if p.name != "tables"]
    assert function.replace(parameters=parameters) == expected


def test_backends_offer_all_functions_of_the_protocol():
    functions = {name for name, value in vars(Backend).items() if inspect.isfunction(value)}
    promised = {name for name in functions if not name.startswith("_")}
    assert promised == set(FUNCTIONS)
    assert all(callable(getattr(reference, name)) for name in promised)


@given(values=tensors(), bits=float32_bits())
def test_backends_unscale_alike(values, bits, device):
    coefficient = any_float(bits, device)
    results = []
    for backend in (mpcore_kernels, reference):
        grads, nonfinite = copies(values, device), flags(len(values), device)
        backend.unscale_(grads, coefficient, nonfinite)
        results.append((grads, nonfinite.tolist()))
    assert_all_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@given(values=tensors(), bits=float32_bits())
def test_backends_unscale_into_alike(values, bits, device):
    coefficient = any_float(bits, device)
    results = []
    for backend in (mpcore_kernels, reference):
        grads, nonfinite = copies(values, device), flags(len(values), device)
        outs = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        backend.unscale_into(grads, outs, coefficient, nonfinite)
        results.append((outs, nonfinite.tolist()))
    assert_all_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@given(masters=tensors(dtypes=(torch.float32,)), found=st.sampled_from([0, 0, 1]), data=st.data())
def test_backends_cast_alike(masters, found, data, device):
    dtypes = [data.draw(st.sampled_from(HALVES)) for _ in masters]
    results = []
    for backend in (mpcore_kernels, reference):
        weights = [
            torch.full_like(m, 2.0, dtype=d, device=device)
            for m, d in zip(masters, dtypes, strict=True)
        ]
        found_inf = torch.tensor(found, dtype=torch.int32, device=device)
        saturated = torch.tensor(5, dtype=torch.int64, device=device)
        backend.cast_into(copies(masters, device), weights, found_inf, saturated)
        results.append((weights, saturated.item()))
    assert_all_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_backends_agree_on_tensors_of_several_chunks(device):
    sizes = [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1]
    values = [random_bits(n, FLOATS[i % 3], seed=i) for i, n in enumerate(sizes)]
    coefficient = torch.tensor(0.37, device=device)
    results = []
    for backend in (mpcore_kernels, reference):
        grads, nonfinite = copies(values, device), flags(len(values), device)
        outs = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        backend.unscale_into(grads, outs, coefficient, nonfinite)
        weights = [torch.empty_like(out, dtype=torch.bfloat16) for out in outs]
        saturated = torch.tensor(0, dtype=torch.int64, device=device)
        backend.cast_into(
            outs, weights, torch.tensor(0, dtype=torch.int32, device=device), saturated
        )
        results.append((outs, weights, nonfinite.tolist(), saturated.item()))
    assert_all_same(results[0][0], results[1][0])
    assert_all_same(results[0][1], results[1][1])
    assert results[0][2:] == results[1][2:]


def every_result(backend, values, device):
    """What the backend's functions on tensors make of `values`, as flat lists of tensors."""
    coefficient, nonfinite = torch.tensor(0.37, device=device), flags(2 * len(values), device)
    grads = copies(values, device)
    outs = [torch.full_like(g, 3.0, dtype=torch.float32) for g in grads]
    backend.unscale_into(grads, outs, coefficient, nonfinite[: len(values)])
    backend.unscale_(grads, coefficient, nonfinite[len(values) :])
    weights = [torch.full_like(o, 3.0, dtype=HALVES[i % 2]) for i, o in enumerate(outs)]
    saturated = torch.tensor(0, device=device)
    backend.cast_into(outs, weights, flags(1, device)[0], saturated)
    return [*grads, *outs, *weights], [nonfinite.tolist(), saturated.item()]


@pytest.mark.parametrize(("size", "dtype"), in_turn(SIZES, FLOATS))
def test_backends_agree_on_a_tensor_of_any_size(dtype, size, device):
    values = [random_bits(size, dtype, seed=size), random_finite(size, dtype, seed=size)]
    for chosen in (values[:1], values[1:], values):
        actual, expected = (every_result(b, chosen, device) for b in (mpcore_kernels, reference))
        assert_all_same(actual[0], expected[0])
        assert actual[1] == expected[1]
        assert_inspect_alike(chosen, torch.tensor(0.37, device=device), 1.0, device)


def test_backends_agree_on_many_tensors_of_mixed_sizes_and_dtypes(device):
    sizes = [SIZES[(3 * i) % len(SIZES)] for i in range(3 * len(SIZES))]
    values = [random_bits(n, FLOATS[i % 3], seed=i) for i, n in enumerate(sizes)]
    actual, expected = (every_result(b, values, device) for b in (mpcore_kernels, reference))
    assert_all_same(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert_inspect_alike(values, torch.tensor(0.37, device=device), 1.0, device)


def assert_inspect_alike(values, coefficient, max_norm, device):
    grads = copies(values, device)
    found = [
        backend.inspect(grads, coefficient, max_norm, statistics=True)
        for backend in (mpcore_kernels, reference)
    ]
    assert_same_inspection(*found)
    found = [
        backend.inspect(grads, coefficient, max_norm, inverted=True)
        for backend in (mpcore_kernels, reference)
    ]
    assert_same_inspection(*found)
    plain = reference.inspect(grads, coefficient, max_norm)
    assert plain.counts is None
    assert plain.histogram is None


@given(
    values=tensors(),
    bits=float32_bits(),
    max_norm=st.one_of(st.none(), st.floats(min_value=0.0, width=32)),
)
def test_backends_inspect_alike(values, bits, max_norm, device):
    assert_inspect_alike(values, any_float(bits, device), max_norm, device)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("exponent", few_of(range(-24, 25), (-24, -17, -8, -1, 0, 1, 15, 24)))
def test_backends_inspect_all_patterns_alike_at_every_power_of_two(dtype, exponent, device):
    patterns = all_patterns(dtype)
    values = [patterns, patterns[patterns.isfinite()]]
    grads, coefficient = copies(values, device), torch.tensor(2.0**exponent, device=device)
    found = [b.inspect(grads, coefficient, 1.0) for b in (mpcore_kernels, reference)]
    assert_same_inspection(*found)


@pytest.mark.parametrize("make", [random_bits, random_finite])
def test_backends_inspect_tensors_of_several_chunks_alike(make, device):
    sizes = [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 5 * CHUNK]
    values = [make(n, FLOATS[i % 3], seed=i) for i, n in enumerate(sizes)]
    for coefficient in (0.37, 2.0**-30, 2.0**80):
        assert_inspect_alike(values, torch.tensor(coefficient, device=device), 1.0, device)
    finite = [random_finite(n, torch.float32, seed=n) * 2.0 ** (n % 90 - 60) for n in sizes]
    assert_inspect_alike(finite, torch.tensor(1.0, device=device), 1.0, device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_backends_inspect_dense_tensors_alike_in_the_order_of_memory(dtype, device):
    base = random_bits(3 * 40 * 5 * 7, dtype, seed=1).to(device).view(3, 40, 5, 7)
    grads = [base.to(memory_format=torch.channels_last), base.permute(3, 0, 2, 1)]
    grads.append(torch.empty_strided((1, 3, 4), (999, 1, 3), dtype=dtype, device=device).fill_(3.0))
    one = torch.tensor(1.0, device=device)
    found = [b.inspect(grads, one, 1.0, statistics=True) for b in (mpcore_kernels, reference)]
    assert_same_inspection(*found)


@given(
    history=st.lists(st.sampled_from([0, 0, 0, 1]), max_size=12),
    hysteresis=st.integers(1, 3),
    refill=st.integers(0, 3),
    tolerance=st.sampled_from([(0, 1), (1, 3), (3, 4)]),
)
def test_backends_update_the_scale_alike(history, hysteresis, refill, tolerance, device):
    results = []
    for backend in (mpcore_kernels, reference):
        state = LossScaleTensors.from_state(LossScaleState(8.0, 0, hysteresis, 0, 0), device)
        for found_inf in history:
            move = ScaleMove(
                *(state.scale, state.growth_tracker, state.overflows_left, state.counters),
                growth_factor=3.0,
                backoff_factor=0.375,  # kernels take float32 factors
                growth_interval=2,
                min_scale=0.7,
                max_scale=100.1,
                hysteresis=hysteresis,
                refill=refill,
                tolerance=tolerance,
            )
            flag = torch.tensor(found_inf, dtype=torch.int32, device=device)
            backend.update_scale_(move, flag)
        results.append(state.to_state())
    assert results[0] == results[1]
