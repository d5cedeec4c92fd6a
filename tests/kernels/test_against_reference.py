"""The Triton backend against the reference backend, bit for bit (invariant 11)."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import reference

import mpcore_kernels
from mpcore_kernels._table import CHUNK
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    assert_same_bits,
    flags,
    float32_bits,
    random_bits,
    tensors,
)


def any_float(bits, device):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)


def copies(values, device):
    return [value.to(device, copy=True) for value in values]


def assert_all_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("name", mpcore_kernels.__all__)
def test_backends_share_names_and_signatures(name):
    assert inspect.signature(getattr(mpcore_kernels, name)) == inspect.signature(
        getattr(reference, name)
    )


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
