"""Products inside `emulate_tensor_cores`: exact products, FP32 sums, one rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpcore.emulate import emulate_tensor_cores

from mpcore_testing.products import HALF, PROBES, Recorder, integers, round16, same_bits, wide

PRODUCTS = {
    "mm": (lambda a, b: torch.mm(a[0], b[0]), lambda a, b: a[0] @ b[0]),
    "bmm": (torch.bmm, lambda a, b: a @ b),
    "matmul": (lambda a, b: a[:, None] @ b[None], lambda a, b: a[:, None] @ b[None]),
    "mv": (lambda a, b: torch.mv(a[0], b[0, :, 0]), lambda a, b: a[0] @ b[0, :, 0]),
    "dot": (
        lambda a, b: torch.dot(a[0, 0], b[0, :, 0]),
        lambda a, b: a[0, 0] @ b[0, :, 0],
    ),
    "vdot": (
        lambda a, b: torch.vdot(a[0, 0], b[0, :, 0]),
        lambda a, b: a[0, 0] @ b[0, :, 0],
    ),
    "einsum": (
        lambda a, b: torch.einsum("nik,nkj->ij", a, b),
        lambda a, b: np.einsum("nik,nkj->ij", a, b),
    ),
    "tensordot": (
        lambda a, b: torch.tensordot(a, b, dims=([2], [1])),
        lambda a, b: np.tensordot(a, b, axes=([2], [1])),
    ),
    "linear": (
        lambda a, b: F.linear(a, b[0].mT, b[1, 0]),
        lambda a, b: a @ b[0] + b[1, 0],
    ),
    "addmm": (
        lambda a, b: torch.addmm(b[0, :6], a[0], b[1], beta=3, alpha=0.5),
        lambda a, b: 3 * b[0, :6] + 0.5 * (a[0] @ b[1]),
    ),
    "addmv": (
        lambda a, b: torch.addmv(a[1, :, 0], a[0], b[0, :, 0], beta=-2, alpha=0.25),
        lambda a, b: -2 * a[1, :, 0] + 0.25 * (a[0] @ b[0, :, 0]),
    ),
    "addbmm": (
        lambda a, b: torch.addbmm(b[0, :6], a, b, beta=2, alpha=0.5),
        lambda a, b: 2 * b[0, :6] + 0.5 * (a @ b).sum(0),
    ),
    "baddbmm": (
        lambda a, b: torch.baddbmm(b[:, :6], a, b, beta=2, alpha=-0.5),
        lambda a, b: 2 * b[:, :6] - 0.5 * (a @ b),
    ),
    "addmm_relu": (
        lambda a, b: torch._addmm_activation(b[0, 0], a[0], b[1]),
        lambda a, b: np.maximum(b[0, 0] + a[0] @ b[1], 0),
    ),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_integers_is_the_exact_result_rounded_once(
    name: str, dtype: torch.dtype
) -> None:
    ours, exact = PRODUCTS[name]
    a = integers(1, 2, 6, 101, dtype=dtype, low=1)
    b = integers(2, 2, 101, 5, dtype=dtype, low=1)
    with emulate_tensor_cores():
        result = ours(a, b)
    expected = exact(wide(a), wide(b))
    assert not np.array_equal(wide(round16(expected, dtype)), expected), "nothing was rounded"
    assert same_bits(result, round16(expected, dtype))


def test_tabulated_products_reach_pytorch_in_fp32_only() -> None:
    a = integers(1, 2, 6, 24, dtype=torch.bfloat16)
    b = integers(2, 2, 24, 5, dtype=torch.bfloat16)
    with Recorder() as recorder, emulate_tensor_cores():
        for ours, _ in PRODUCTS.values():
            ours(a, b)
    assert recorder.count(*HALF) == 0
    assert recorder.count(torch.float32) == len(PRODUCTS) + PROBES


@pytest.mark.parametrize("dtype", HALF)
def test_convolution_of_integers_is_the_exact_result_rounded_once(dtype: torch.dtype) -> None:
    x, w = integers(3, 2, 3, 8, 8, dtype=dtype), integers(4, 4, 3, 3, 3, dtype=dtype)
    bias = integers(5, 4, dtype=dtype)
    windows = np.lib.stride_tricks.sliding_window_view(wide(x), (3, 3), axis=(2, 3))
    exact = np.einsum("nchwij,ocij->nohw", windows, wide(w)) + wide(bias)[:, None, None]
    with Recorder() as recorder, emulate_tensor_cores():
        result = F.conv2d(x, w, bias)
    assert same_bits(result, round16(exact, dtype))
    assert recorder.count(*HALF) == 0


@pytest.mark.parametrize("dtype", HALF)
def test_in_place_and_out_forms_write_the_rounded_result(dtype: torch.dtype) -> None:
    a, b = integers(1, 6, 24, dtype=dtype), integers(2, 24, 6, dtype=dtype)
    c = integers(3, 6, 6, dtype=dtype)
    out, inplace = torch.empty(0, dtype=dtype), c.clone()
    version = inplace._version
    with Recorder() as recorder, emulate_tensor_cores():
        returned = torch.mm(a, b, out=out)
        returned_inplace = inplace.addmm_(a, b, beta=2, alpha=0.5)
    assert returned is out
    assert returned_inplace is inplace
    assert same_bits(out, round16(wide(a) @ wide(b), dtype))
    assert same_bits(inplace, round16(2 * wide(c) + 0.5 * (wide(a) @ wide(b)), dtype))
    assert inplace._version > version
    assert recorder.count(*HALF) == 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("k", [1, 64, 1000])
def test_product_of_normals_stays_within_the_fp32_accumulation_bound(
    k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(k)
    a, b = torch.randn(17, k).to(dtype), torch.randn(k, 19).to(dtype)
    with emulate_tensor_cores():
        result = wide(a @ b)
    exact = wide(a) @ wide(b)
    # k additions of FP32 rounding each, then half an ULP of the 16-bit result
    accumulation = k * 2.0**-24 * (np.abs(wide(a)) @ np.abs(wide(b)))
    half_ulp = np.abs(exact) * torch.finfo(dtype).eps / 2 + 2.0**-25
    assert (np.abs(result - exact) <= half_ulp + 1.01 * accumulation).all()


def test_product_beyond_the_fp16_maximum_rounds_to_infinity() -> None:
    row = torch.tensor([[65504.0, 1.0]], dtype=torch.float16)
    columns = torch.tensor([[1, 1, -1], [15, 16, -16]], dtype=torch.float16)
    with emulate_tensor_cores():
        result = row @ columns
    # 65519 is nearer to 65504; 65520 lies half way to 65536 and rounds up
    assert result.tolist() == [[65504.0, float("inf"), float("-inf")]]


def test_partial_sums_beyond_the_fp16_maximum_do_not_overflow() -> None:
    a = torch.full((1, 2), 256.0, dtype=torch.float16)
    b = torch.tensor([[256.0], [-256.0]], dtype=torch.float16)
    with emulate_tensor_cores():
        assert (a @ b).item() == 0.0
        assert torch.dot(a[0], b[:, 0]).item() == 0.0


@pytest.mark.parametrize(
    ("dtype", "tiny"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)]
)
def test_subnormal_results_are_kept_and_ties_go_to_even(dtype: torch.dtype, tiny: float) -> None:
    a = torch.tensor([[tiny * 2.0**10]], dtype=dtype)
    b = torch.tensor([[2.0**-10, 2.0**-11, 1.5 * 2.0**-10]], dtype=dtype)
    with emulate_tensor_cores():
        result = a @ b
    assert wide(result).tolist() == [[tiny, 0.0, 2 * tiny]]


@pytest.mark.parametrize("dtype", HALF)
def test_linear_gradients_are_the_exact_products_rounded_once(dtype: torch.dtype) -> None:
    x, w = integers(1, 2, 8, 24, dtype=dtype), integers(2, 5, 24, dtype=dtype)
    g = integers(3, 2, 8, 5, dtype=dtype)
    x.requires_grad_()
    w.requires_grad_()
    with emulate_tensor_cores():
        y = F.linear(x, w)
        y.backward(g)
    assert x.grad is not None
    assert w.grad is not None
    assert same_bits(y.detach(), round16(wide(x) @ wide(w).T, dtype))
    assert same_bits(x.grad, round16(wide(g) @ wide(w), dtype))
    exact = np.einsum("bti,btj->ij", wide(g), wide(x))
    assert same_bits(w.grad, round16(exact, dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_convolution_gradients_are_those_of_fp32_rounded_once(dtype: torch.dtype) -> None:
    # integers again: every FP32 sum is exact, so the order of additions does not matter
    x, w = integers(1, 2, 3, 9, dtype=dtype), integers(2, 4, 3, 3, dtype=dtype)
    g = integers(3, 2, 4, 7, dtype=dtype)
    halves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    singles = [x.float().requires_grad_(), w.float().requires_grad_()]
    with Recorder() as recorder, emulate_tensor_cores():
        F.conv1d(*halves).backward(g)
    F.conv1d(*singles).backward(g.float())
    for half, single in zip(halves, singles, strict=True):
        assert half.grad is not None
        assert single.grad is not None
        assert same_bits(half.grad, round16(wide(single.grad), dtype))
    assert recorder.count(*HALF) == 0


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this PyTorch has no grouped product")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stated", [False, True])
def test_grouped_product_is_the_exact_result_rounded_once(stated: bool, dtype: torch.dtype) -> None:
    a = integers(1, 6, 104, dtype=dtype, low=1)
    b = integers(2, 2, 104, 8, dtype=dtype, low=1)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    with Recorder() as recorder, emulate_tensor_cores():
        result = torch._grouped_mm(a, b, offs=ends, out_dtype=dtype if stated else None)
    exact = np.concatenate([wide(a[:2]) @ wide(b[0]), wide(a[2:]) @ wide(b[1])])
    assert same_bits(result, round16(exact, dtype))
    assert recorder.count(*HALF) == 0


@pytest.mark.parametrize("dtype", HALF)
def test_bilinear_form_is_the_exact_result_rounded_once(dtype: torch.dtype) -> None:
    x, y = integers(1, 4, 9, dtype=dtype), integers(2, 4, 8, dtype=dtype)
    w = integers(3, 5, 9, 8, dtype=dtype, low=-3, high=3)
    with emulate_tensor_cores():
        result = F.bilinear(x, y, w)
    exact = np.einsum("bi,oij,bj->bo", wide(x), wide(w), wide(y))
    assert same_bits(result, round16(exact, dtype))
