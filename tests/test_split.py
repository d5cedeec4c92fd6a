"""Split masters: which float32 numbers come back, and what the weight beside a remainder is."""

import numpy as np
import pytest
import torch
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
