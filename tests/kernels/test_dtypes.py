"""The conversions inside the kernels, each over the whole of its own domain."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from mpcore_kernels._dtypes import (
    FORMATS,
    access_bytes,
    is_nonfinite,
    narrow,
    narrow_product,
    pointer,
    saturate,
    widen,
)
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    INTEGER,
    all_patterns,
    assert_same_bits,
    random_bits,
    rounding_boundaries,
)
from mpcore_testing.strategies import float32_bits

BLOCK = 8192


@triton.jit
def _widen_kernel(bits_ptr, out_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, widen(tl.load(bits_ptr + at), FORMAT))


@triton.jit
def _narrow_kernel(x_ptr, out_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, narrow(tl.load(x_ptr + at), FORMAT))


@triton.jit
def _narrow_product_kernel(x_ptr, out_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, narrow_product(tl.load(x_ptr + at), FORMAT))


@triton.jit
def _saturate_kernel(x_ptr, out_ptr, clamped_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out, clamped = saturate(tl.load(x_ptr + at), FORMAT)
    tl.store(out_ptr + at, out)
    tl.store(clamped_ptr + at, clamped.to(tl.int32))


@triton.jit
def _is_nonfinite_kernel(bits_ptr, out_ptr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, is_nonfinite(tl.load(bits_ptr + at), FORMAT).to(tl.int32))


@triton.jit
def _pointer_kernel(address_ptr, out_ptr, FORMAT: tl.constexpr):
    tl.store(out_ptr, tl.load(pointer(tl.load(address_ptr), FORMAT) + 1))


def elementwise(kernel, inputs, out_dtypes, fmt, device):
    """Runs a test kernel over `inputs`, filled up to whole blocks with zeros."""
    size = inputs.numel()
    programs = max(1, -(-size // BLOCK))
    padded = torch.zeros(programs * BLOCK, dtype=inputs.dtype, device=device)
    padded[:size] = inputs.to(device)
    outs = [torch.empty(programs * BLOCK, dtype=dtype, device=device) for dtype in out_dtypes]
    kernel[(programs,)](
        padded, *outs, FORMAT=FORMATS[fmt], BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False
    )
    return [out[:size].cpu() for out in outs]


def narrowed(x, fmt, device, kernel=_narrow_kernel):
    (bits,) = elementwise(kernel, x, [INTEGER[fmt]], fmt, device)
    return bits.view(fmt)


def hard_values():
    return torch.cat([rounding_boundaries(), random_bits(50_000, torch.float32, seed=1)])


@pytest.mark.parametrize("fmt", HALVES)
def test_widen_is_exact_for_all_65536_patterns(fmt, device):
    values = all_patterns(fmt)
    (out,) = elementwise(_widen_kernel, values.view(torch.int16), [torch.float32], fmt, device)
    assert_same_bits(out, values.float())


def test_widen_and_narrow_pass_float32_bits_through(device):
    bits = random_bits(5000, torch.float32, seed=2).view(torch.int32)
    (x,) = elementwise(_widen_kernel, bits, [torch.float32], torch.float32, device)
    assert torch.equal(x.view(torch.int32), bits)
    (out,) = elementwise(_narrow_kernel, x, [torch.int32], torch.float32, device)
    assert torch.equal(out, bits)


@pytest.mark.parametrize("kernel", [_narrow_kernel, _narrow_product_kernel])
@pytest.mark.parametrize("fmt", HALVES)
def test_narrow_rounds_to_nearest_even_at_every_exponent_and_boundary(fmt, kernel, device):
    x = hard_values()
    assert_same_bits(narrowed(x, fmt, device, kernel), x.to(fmt))


@pytest.mark.parametrize("fmt", HALVES)
def test_narrow_undoes_widen_for_all_65536_patterns(fmt, device):
    values = all_patterns(fmt)
    assert_same_bits(narrowed(values.float(), fmt, device), values)


@pytest.mark.parametrize("fmt", HALVES)
def test_narrow_keeps_every_kind_of_nan_a_nan(fmt, device):
    # payloads in the dropped bits only, in the kept bits only, all ones (a carry would make -0)
    payloads = [1, 0x1FFF, 0xFFFF, 0x10000, 0x400000, 0x7FFFFF, 0x7F8000, 0x3FFFFF]
    bits = torch.tensor([0x7F800000 + p for p in payloads], dtype=torch.int32)
    x = torch.cat([bits, bits | -(2**31)]).view(torch.float32)
    assert x.isnan().all()
    assert narrowed(x, fmt, device).isnan().all()


@given(bits=st.lists(float32_bits(), min_size=1, max_size=64), fmt=st.sampled_from(HALVES))
def test_narrow_rounds_any_bits_as_torch_does(bits, fmt, device):
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert_same_bits(narrowed(x, fmt, device), x.to(fmt))


@pytest.mark.parametrize("fmt", HALVES)
def test_saturate_clamps_exactly_the_finite_values_that_round_to_infinity(fmt, device):
    x = hard_values()
    out, clamped = elementwise(_saturate_kernel, x, [torch.float32, torch.int32], fmt, device)
    expected = x.isfinite() & x.to(fmt).isinf()
    assert torch.equal(clamped.bool(), expected)
    assert expected.any()
    assert_same_bits(out, torch.where(expected, x.sign() * torch.finfo(fmt).max, x))


@pytest.mark.parametrize("fmt", FLOATS)
def test_is_nonfinite_finds_the_infinities_and_nans_and_no_others(fmt, device):
    values = hard_values() if fmt == torch.float32 else all_patterns(fmt)
    bits = values.view(INTEGER[fmt])
    (out,) = elementwise(_is_nonfinite_kernel, bits, [torch.int32], fmt, device)
    assert torch.equal(out.bool(), ~values.isfinite())


@pytest.mark.parametrize("fmt", FLOATS)
def test_pointer_steps_by_the_size_of_one_element(fmt, device):
    values = torch.tensor([1.5, -2.5], dtype=fmt, device=device)
    address = torch.tensor([values.data_ptr()], device=device)
    out = torch.zeros(1, dtype=INTEGER[fmt], device=device)
    _pointer_kernel[(1,)](address, out, FORMAT=FORMATS[fmt], enable_fp_fusion=False)
    assert out.view(fmt).item() == -2.5


def test_access_bytes_give_both_formats_the_same_number_of_elements():
    assert access_bytes(tl.float16, tl.float16) == 16
    assert access_bytes(tl.bfloat16, tl.float32) == 8
    assert access_bytes(tl.float32, tl.bfloat16) == 16
    assert access_bytes(tl.float32, tl.float32) == 16
