"""Attention and fused layers inside `emulate_tensor_cores`: FP32 within, rounded at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpcore.emulate import emulate_tensor_cores
from torch import nn

from mpcore_testing.products import HALF, Recorder, same_bits


def masks(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    keep = torch.ones(16, 16, dtype=torch.bool).tril()
    added = torch.zeros(16, 16).masked_fill(~keep, -1e4)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": keep},
        "half": {"attn_mask": added.to(dtype)},
        "single": {"attn_mask": added},
        "scale": {"scale": 0.3},
        "dropout": {"dropout_p": 0.25},
    }


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", masks(torch.float16))
def test_attention_computes_in_fp32_and_rounds_its_output_once(
    kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, 16, 8).to(dtype) for _ in range(3))
    options = masks(dtype)[kind]
    torch.manual_seed(2)
    with Recorder() as recorder, emulate_tensor_cores():
        result = F.scaled_dot_product_attention(q, k, v, **options)
    if kind == "half":
        options = {"attn_mask": options["attn_mask"].float()}
    torch.manual_seed(2)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    assert same_bits(result, expected.to(dtype))
    assert recorder.count(*HALF) == 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_agrees_with_float64_forward_and_backward(
    causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    halves = [torch.randn(2, 3, 16, 8).to(dtype).requires_grad_() for _ in range(3)]
    doubles = [x.detach().double().requires_grad_() for x in halves]
    g = torch.randn(2, 3, 16, 8).to(dtype)
    with Recorder() as recorder, emulate_tensor_cores():
        y = F.scaled_dot_product_attention(*halves, is_causal=causal)
        y.backward(g)
    scores = doubles[0] @ doubles[1].mT / 8**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -torch.inf)
    exact = scores.softmax(-1) @ doubles[2]
    exact.backward(g.double())
    eps = torch.finfo(dtype).eps
    # one rounding of the output: half an ULP, and FP32's own error is far below the rest of it
    assert ((y.double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-7).all()
    for half, double in zip(halves, doubles, strict=True):
        assert half.grad is not None
        assert double.grad is not None
        # the saved output is 16-bit, so dq and dk carry its rounding times sums of 16 terms
        bound = eps * (0.51 * double.grad.abs() + double.grad.abs().max())
        assert ((half.grad.double() - double.grad).abs() <= bound).all()
    assert recorder.count(*HALF) == 0


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("dtype", HALF)
def test_encoder_fast_path_rounds_once_per_fused_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(dtype).eval()
    single = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    single.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 16).to(dtype)
    with torch.no_grad():
        expected = single(x.float()).to(dtype)
        with emulate_tensor_cores():
            assert same_bits(layer(x), expected)
            attention, _ = layer.self_attn(x, x, x)
        assert same_bits(attention, single.self_attn(*[x.float()] * 3)[0].to(dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["softmax", "layer_norm", "gelu"])
def test_pytorch_computes_other_layers_in_fp32_by_itself(name: str, dtype: torch.dtype) -> None:
    # what docs/emulation.md relies on when it leaves these layers alone
    function = {
        "softmax": lambda x: x.softmax(-1),
        "layer_norm": lambda x: F.layer_norm(x, (64,)),
        "gelu": F.gelu,
    }[name]
    torch.manual_seed(0)
    x = torch.randn(8, 64).to(dtype)
    exact = function(x.double())
    eps = torch.finfo(dtype).eps
    # half an ULP (of at most eps * |y|) for the one rounding, the rest for FP32's own error
    assert ((function(x).double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-6).all()
