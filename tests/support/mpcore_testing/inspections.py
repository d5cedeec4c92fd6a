"""What `inspect` should find, worked out in NumPy float64, and comparisons of two inspections."""

from __future__ import annotations

import dataclasses
import math

import numpy
import torch

from mpcore_testing.comparisons import TALLY

# stated in mpcore_kernels._sums, for the sum of squares of tensors of up to 2^12 chunks
SUM_ERROR = 3 * 2.0**-24 + 2.0**-33
NORM_ULPS = 2


def unscaled(grad, coefficient):
    """The float32 product of a 1-d gradient and a Python float, as NumPy float64."""
    product = grad.cpu().float() * torch.tensor(coefficient, dtype=torch.float32)
    return product.numpy().astype(numpy.float64)


def expected_kinds(grad, coefficient):
    """The bits of `kinds` and the first bad place, value by value."""
    loaded = grad.cpu().float().numpy().astype(numpy.float64)
    product = unscaled(grad, coefficient)
    kinds = 0
    for value, result in zip(loaded, product, strict=True):
        if math.isnan(value):
            kinds |= 1
        elif math.isinf(value):
            kinds |= 2 if value > 0 else 4
        elif not math.isfinite(result):
            kinds |= 8
    bad = numpy.flatnonzero(~numpy.isfinite(product))
    return kinds, int(bad[0]) if len(bad) else -1


def expected_square_sum(grad, coefficient):
    """The exact sum of squares, rounded once: squares of float32 are exact in float64."""
    product = unscaled(grad, coefficient)
    if grad.isnan().any():
        return math.nan
    if not numpy.isfinite(product).all():
        return math.inf
    return math.fsum((product * product).tolist())


def expected_largest(grad, coefficient):
    """The largest finite magnitude, 0 if there is none."""
    product = numpy.abs(unscaled(grad, coefficient))
    return float(product[numpy.isfinite(product)].max(initial=0.0))


def expected_counts(grad):
    """NaN, +inf, -inf, zero, subnormal, normal, by comparisons of values."""
    values = grad.cpu().float().numpy().astype(numpy.float64)
    smallest = torch.finfo(grad.dtype).tiny
    finite = numpy.abs(values[numpy.isfinite(values)])
    return [
        int(numpy.isnan(values).sum()),
        int((values == numpy.inf).sum()),
        int((values == -numpy.inf).sum()),
        int((finite == 0).sum()),
        int(((finite > 0) & (finite < smallest)).sum()),
        int((finite >= smallest).sum()),
    ]


def expected_histogram(grad):
    """The float32 exponents, by `numpy.frexp`."""
    values = grad.cpu().float().numpy().astype(numpy.float64)
    histogram = numpy.zeros(256, dtype=numpy.int64)
    for value in values:
        if not math.isfinite(value):
            histogram[255] += 1
        elif abs(value) < 2.0**-126:
            histogram[0] += 1
        else:
            # frexp gives a mantissa in [0.5, 1)
            histogram[int(numpy.frexp(value)[1]) - 1 + 127] += 1
    return histogram.tolist()


def ulps_between(first, second):
    """How many float32 numbers two float32 numbers are apart; none for equal infinities or NaNs."""
    if math.isnan(first) or math.isnan(second):
        return 0 if math.isnan(first) and math.isnan(second) else math.inf
    bits = torch.tensor([first, second], dtype=torch.float32).view(torch.int32).tolist()
    return abs(bits[0] - bits[1])


def assert_same_inspection(actual, expected):
    """Fails unless both hold the same fields, dtypes, shapes and bits; any NaN equals any NaN."""
    names = [field.name for field in dataclasses.fields(expected)]
    assert [field.name for field in dataclasses.fields(actual)] == names
    for name in names:
        a, e = getattr(actual, name), getattr(expected, name)
        if e is None:
            assert a is None, name
            continue
        a, e = a.cpu(), e.cpu()
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        TALLY.add(a.numel())
        if a.is_floating_point():
            assert torch.equal(a.isnan(), e.isnan()), name
            a, e = (torch.where(t.isnan(), 0.0, t) for t in (a, e))
            integer = torch.int64 if a.dtype == torch.float64 else torch.int32
            a, e = a.view(integer), e.view(integer)
        assert torch.equal(a, e), f"{name}: got {a}, expected {e}"


def assert_inspection(found, grads, coefficient):
    """Fails unless `found` is what NumPy finds in 1-d `grads`; floats within the stated bounds."""
    expected = [expected_kinds(grad, coefficient) for grad in grads]
    assert found.kinds.tolist() == [kinds for kinds, _ in expected]
    assert found.first_bad.tolist() == [first for _, first in expected]
    assert found.largest.tolist() == [expected_largest(grad, coefficient) for grad in grads]
    assert found.found_inf.item() == int(any(kinds for kinds, _ in expected))
    sums = [expected_square_sum(grad, coefficient) for grad in grads]
    for actual, exact in zip(found.square_sum.tolist(), sums, strict=True):
        if math.isfinite(exact):
            assert abs(actual - exact) <= SUM_ERROR * exact
        else:
            assert actual == exact or math.isnan(actual) == math.isnan(exact) is True
    total = math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
    norm = numpy.float32(numpy.sqrt(numpy.float64(total)))
    assert ulps_between(found.grad_norm.item(), float(norm)) <= NORM_ULPS
