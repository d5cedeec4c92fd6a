"""Inputs for the kernels as strategies of Hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from mpcore_testing.kernels import FLOATS, INTEGER


def float32_bits():
    """A strategy: FP32 values of any bits, rounding boundaries and specials made likely."""
    near_zero = [0, 1, 0x007FFFFF, 0x00800000, 0x33000000, 0x387FC000, 0x387FE000]
    near_float16_max = [0x477FE000, 0x477FEFFF, 0x477FF000]
    near_bfloat16_max = [0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]
    specials = [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    edges = st.sampled_from(near_zero + near_float16_max + near_bfloat16_max + specials)
    magnitude = st.one_of(edges, st.integers(0, 2**31 - 1))
    return st.tuples(magnitude, st.booleans()).map(lambda pair: pair[0] - (pair[1] << 31))


@st.composite
def tensors(draw, dtypes=tuple(FLOATS), max_tensors=4, max_size=40):
    """A strategy: a list of 1-d tensors of mixed dtypes with raw bits."""
    result = []
    for _ in range(draw(st.integers(0, max_tensors))):
        dtype = draw(st.sampled_from(dtypes))
        element = float32_bits() if dtype == torch.float32 else st.integers(-(2**15), 2**15 - 1)
        bits = draw(st.lists(element, max_size=max_size))
        result.append(torch.tensor(bits, dtype=INTEGER[dtype]).view(dtype))
    return result
