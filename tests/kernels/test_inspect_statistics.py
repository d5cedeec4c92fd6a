"""The optional counts of inspect against NumPy, value by value."""

import pytest
import torch
from hypothesis import given

from mpcore_kernels import inspect
from mpcore_kernels._table import CHUNK
from mpcore_testing.inspections import (
    assert_same_inspection,
    expected_counts,
    expected_histogram,
)
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    SIZES,
    all_patterns,
    guarded,
    random_bits,
    rounding_boundaries,
)
from mpcore_testing.strategies import tensors


def assert_statistics(values, device, offsets=None):
    placed = [
        guarded(v, device, o) for v, o in zip(values, offsets or [0] * len(values), strict=True)
    ]
    one = torch.tensor(0.5, device=device)
    found = inspect([p.tensor for p in placed], one, None, statistics=True)
    assert found.counts.tolist() == [expected_counts(value) for value in values]
    assert found.histogram.tolist() == [expected_histogram(value) for value in values]
    for p in placed:
        p.assert_margins_intact()


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_count_all_65536_patterns(dtype, device):
    assert_statistics([all_patterns(dtype)], device)


def test_statistics_count_float32_at_every_exponent(device):
    assert_statistics([rounding_boundaries()[::7]], device)


def test_statistics_count_each_tensor_by_itself(device):
    values = [random_bits(n, FLOATS[i % 3], seed=i) for i, n in enumerate(SIZES * 2)]
    assert_statistics(values, device)
    assert_statistics(values, device, offsets=[i % 5 for i in range(len(values))])


@given(values=tensors())
def test_statistics_count_any_bits(values, device):
    assert_statistics(values, device)


def test_statistics_count_loaded_values_whatever_the_coefficient(device):
    values = [random_bits(CHUNK + 1, torch.float16, seed=3).to(device)]
    rows = [
        inspect(values, torch.tensor(c, device=device), None, statistics=True).histogram.tolist()
        for c in (1.0, 2.0**-20, float("nan"))
    ]
    assert rows[0] == rows[1] == rows[2]


def test_statistics_leave_the_rest_of_an_inspection_as_it_is(device):
    values = [random_bits(n, FLOATS[i % 3], seed=i).to(device) for i, n in enumerate(SIZES)]
    coefficient = torch.tensor(0.37, device=device)
    plain = inspect(values, coefficient, 1.0)
    counted = inspect(values, coefficient, 1.0, statistics=True)
    assert plain.counts is None
    assert plain.histogram is None
    fields = {
        name: value for name, value in vars(counted).items() if name not in ("counts", "histogram")
    }
    assert_same_inspection(plain, type(plain)(**fields))


def test_statistics_start_at_zero_in_every_call(device):
    grads = [torch.ones(3, device=device)]
    for _ in range(2):
        found = inspect(grads, torch.tensor(1.0, device=device), None, statistics=True)
        assert found.counts.tolist() == [[0, 0, 0, 0, 0, 3]]
