"""`mpcore.preflight`: ranges as NumPy sees them, and a recommendation that holds."""

from __future__ import annotations

import copy
import math

import mpcore
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits


class Net(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.gain = nn.Linear(6, 8), nn.Linear(8, 3), gain

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.gain)


def batch() -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def test_ranges_are_those_of_the_tensors() -> None:
    model = Net()
    found = mpcore.preflight(model, batch(), loss_of)
    by_place = {(one.kind, one.name): one for one in found.ranges}
    hidden = model.first(batch())
    output = model.last(torch.relu(hidden))
    hidden.retain_grad()
    output.retain_grad()
    loss_of(output).backward()
    expected = {
        ("weight", "first.weight"): model.first.weight,
        ("activation", "first"): hidden,
        ("activation", "last"): output,
        ("activation", ""): output,
        ("gradient", "first"): hidden.grad,
        ("gradient", "last"): output.grad,
        ("weight gradient", "last.bias"): model.last.bias.grad,
    }
    assert set(expected) <= set(by_place)
    for place, tensor in expected.items():
        assert tensor is not None
        sizes = np.abs(tensor.detach().double().numpy())
        sizes = sizes[sizes > 0]
        one = by_place[place]
        assert (one.largest, one.smallest) == (sizes.max(), sizes.min())
        exponents, counts = np.unique(np.floor(np.log2(sizes)).astype(int), return_counts=True)
        assert one.exponents == dict(zip(exponents.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**-14])
def test_shares_are_those_of_casting(scale: float) -> None:
    """Powers of two, of which rounding has nothing to say but at the edges."""
    weight = torch.ldexp(torch.ones(60), torch.arange(-40, 20))
    model = nn.Linear(60, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight[None])
    found = mpcore.preflight(model, torch.ones(1, 60), lambda out: out.sum())
    one = next(one for one in found.ranges if one.kind == "weight")
    cast = (weight * scale).half()
    # 2^-25 alone is rounded to 0 and counts as the exponent that is half lost
    at_edge = int((weight * scale == 2.0**-25).sum())
    assert one.flushed(torch.float16, scale) == (int((cast == 0).sum()) - at_edge) / 60
    assert one.overflowing(torch.float16, scale) == int(cast.isinf().sum()) / 60
    assert one.overflowing(torch.bfloat16) == one.flushed(torch.bfloat16) == 0.0


@pytest.mark.parametrize("weight", [1.0, 1e-6, 1e-9])
def test_the_recommended_scale_works_and_eight_times_as_much_does_not(weight: float) -> None:
    model = Net()
    found = mpcore.preflight(model, batch(), lambda out: loss_of(out) * weight)
    assert found.dtype == torch.float16
    assert found.problems(torch.float16, found.loss_scale) == []
    assert math.log2(found.loss_scale).is_integer()
    peak = max(one.largest for one in found.ranges if "gradient" in one.kind)
    limit = 2.0**32
    if found.loss_scale < limit:
        assert 2.0**13 <= peak * found.loss_scale < 2.0**14
    half = copy.deepcopy(model).half()
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(half.parameters(), lr=0.1), mpcore.StaticLossScale(found.loss_scale)
    )
    optimizer.backward(loss_of(half(batch().half())) * weight)
    optimizer.step()
    assert not optimizer.last_step.skipped
    if found.loss_scale < limit:
        assert found.problems(torch.float16, 8 * found.loss_scale)


def test_an_activation_out_of_float16s_range_is_named() -> None:
    found = mpcore.preflight(Net(gain=1e6), batch(), lambda out: loss_of(out) * 1e-12)
    assert (found.dtype, found.loss_scale) == (torch.bfloat16, 1.0)
    assert "activation" in found.reason
    assert "65504" in found.reason
    assert {one.name for one in found.problems(torch.float16)} >= {"last", ""}
    assert "bfloat16" in str(found)


def test_gradients_that_no_scale_fits_ask_for_bfloat16() -> None:
    model = Net()
    spread = torch.ldexp(torch.ones(16), torch.arange(-40, 24, 4))

    def loss(output: Tensor) -> Tensor:
        return (output.sum(1) * spread).sum()

    found = mpcore.preflight(model, batch(), loss)
    assert found.dtype == torch.bfloat16
    assert "at any scale" in found.reason


def test_what_is_not_float32_or_not_finite_is_refused() -> None:
    with pytest.raises(mpcore.ArgumentError, match=r"first\.weight"):
        mpcore.preflight(Net().half(), batch().half(), loss_of)
    bad = batch()
    bad[0, 0] = torch.inf
    with pytest.raises(mpcore.ArgumentError, match="trace_overflow"):
        mpcore.preflight(Net(), bad, loss_of)


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), Net())
    before = dict(copy.deepcopy(model.state_dict()))
    mpcore.preflight(model, batch(), loss_of)
    assert same_bits(dict(model.state_dict()), before)
    assert all(param.grad is None for param in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
