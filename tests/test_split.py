"""Split masters: which float32 numbers come back, and what the weight beside a remainder is."""

import ctypes

import numpy as np
import pytest
import torch
from mpcore.backends import _c_command, _c_compiler
from mpcore.backends._c_work import DTYPES
from mpcore.stores import is_clamped, join, split

from mpcore_testing.kernels import assert_same_bits
from mpcore_testing.stores import (
    all_patterns,
    assert_bfloat16_is_split,
    assert_float16_is_split,
    every_exponent_of_float16,
    sampled_patterns,
)

HALVES = [torch.float16, torch.bfloat16]


def test_bfloat16_on_lower_halves_of_all_upper_ones():
    for bits in sampled_patterns():
        assert_bfloat16_is_split(split, join, bits)


@pytest.mark.exhaustive
def test_bfloat16_on_all_patterns():
    for bits in all_patterns():
        assert_bfloat16_is_split(split, join, bits)


def test_float16_on_patterns_of_every_exponent():
    for bits in every_exponent_of_float16(2**12):
        assert_float16_is_split(split, join, bits)


@pytest.mark.exhaustive
def test_float16_on_all_patterns_that_come_back_and_many_that_need_not():
    for bits in every_exponent_of_float16(None):
        assert_float16_is_split(split, join, bits)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_too_large_is_clamped_and_what_is_not_finite_stays(dtype):
    largest = torch.finfo(dtype).max
    above = torch.nextafter(torch.tensor(largest), torch.tensor(torch.inf)).item()
    value = torch.tensor([above, -above, 3.4e38, torch.inf, -torch.inf, torch.nan, largest])
    weight, remainder = split(value, dtype)
    expected = torch.tensor([largest, -largest, largest, torch.inf, -torch.inf, torch.nan, largest])
    assert_same_bits(join(weight, remainder), expected)
    assert_same_bits(weight, expected.to(dtype))
    assert remainder.tolist() == [0] * 7
    assert is_clamped(value, dtype).tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("dtype", HALVES)
def test_a_weight_that_others_wrote_is_less_than_a_place_from_its_master(dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = weight.double()
    # a place of the weight, by NumPy; the largest one has none above it
    place = np.abs(np.spacing(weight.float().numpy().astype(np.float32))) * (
        2.0**13 if dtype == torch.float16 else 2.0**16
    )
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    place = torch.tensor(place, dtype=torch.float64).clamp(min=smallest)
    for rest in (-(2**15), -(2**14), -1, 0, 1, 77, 2**14, 2**15 - 1):
        master = join(weight, torch.full(weight.shape, rest, dtype=torch.int16))
        assert torch.equal(master.isnan(), weight.isnan())
        assert torch.equal(master.isinf(), weight.isinf())
        finite = weight.isfinite()
        assert ((master.double() - wide).abs()[finite] < place[finite]).all()
        signs = master.signbit() == weight.signbit()
        assert (signs | (wide == 0) | weight.isnan()).all()


def test_a_zero_beside_a_negative_remainder_is_no_nan():
    weight = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    master = join(weight, torch.tensor([-5, -5], dtype=torch.int16))
    assert_same_bits(master, torch.tensor([0.0, -0.0]))


@pytest.mark.parametrize("dtype", HALVES)
def test_shapes_and_strides_are_those_of_the_value(dtype):
    value = torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last)
    weight, remainder = split(value, dtype)
    assert weight.stride() == remainder.stride() == value.stride()
    assert join(weight, remainder).stride() == value.stride()
    assert torch.equal(join(weight, remainder), value)


@pytest.fixture(scope="module", params=["native", "portable"])
def in_c(request):
    """The functions of the compiled backend, with a processor's conversions or without."""
    head = "#define PORTABLE\n" if request.param == "portable" else ""
    library = _c_compiler.load(f'{head}#include "{_c_command.SOURCE}"\n{_DOORS}')
    return lambda value, dtype: _split_in_c(library, value, dtype), library


_DOORS = """
void split_all(int dtype, float *from, uint16_t *weight, int16_t *rest, int64_t n) {
    for (int64_t i = 0; i < n; i += TILE)
        split(dtype, from + i, weight + i, rest + i, n - i < TILE ? n - i : TILE);
}
void join_all(int dtype, const uint16_t *weight, const int16_t *rest, float *to, int64_t n) {
    if (dtype == BFLOAT16) {
        join_bfloat16(weight, rest, to, n);
    } else {
        widen_float16(weight, to, n);
        join_float16(rest, to, n);
    }
}
"""


def _address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def _split_in_c(library, value, dtype):
    value = value.clone()  # which is clamped in place
    weight = torch.empty(len(value), dtype=dtype)
    rest = torch.empty(len(value), dtype=torch.int16)
    places = map(_address, (value, weight, rest))
    library.split_all(DTYPES[dtype], *places, ctypes.c_int64(len(value)))
    return weight, rest


def _join_in_c(library, weight, rest):
    to = torch.empty(len(weight))
    places = map(_address, (weight, rest, to))
    library.join_all(DTYPES[weight.dtype], *places, ctypes.c_int64(len(weight)))
    return to


def _judged_in_c(in_c, dtype, patterns):
    split_in_c, library = in_c
    judge = assert_float16_is_split if dtype == torch.float16 else assert_bfloat16_is_split
    for bits in patterns:
        judge(split_in_c, lambda weight, rest: _join_in_c(library, weight, rest), bits)


def test_c_on_chosen_patterns(in_c):
    _judged_in_c(in_c, torch.bfloat16, sampled_patterns())
    _judged_in_c(in_c, torch.float16, every_exponent_of_float16(2**10))


@pytest.mark.exhaustive
def test_c_on_all_patterns(in_c):
    _judged_in_c(in_c, torch.bfloat16, all_patterns())
    _judged_in_c(in_c, torch.float16, every_exponent_of_float16(None))


@pytest.mark.parametrize("dtype", HALVES)
def test_c_joins_every_weight_with_any_remainder_as_torch_does(in_c, dtype):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for rest in (-(2**15), -(2**14), -1, 0, 1, 77, 2**14, 2**15 - 1):
        rests = torch.full(weight.shape, rest, dtype=torch.int16)
        assert_same_bits(_join_in_c(in_c[1], weight, rests), join(weight, rests))
