"""`mpcore.preflight`: ranges as NumPy sees them, and a recommendation that holds."""

from __future__ import annotations

import copy
import math

import mpcore
import numpy as np
import pytest
import torch
from mpcore.monitoring.preflight import Preflight
from mpcore.monitoring.ranges import Range, range_of
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
    weight = torch.ldexp(torch.ones(60), torch.arange(-40, 20))
    model = nn.Linear(60, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight[None])
    found = mpcore.preflight(model, torch.ones(1, 60), lambda out: out.sum())
    one = next(one for one in found.ranges if one.kind == "weight")
    cast = (weight * scale).half()
    assert one.flushed(torch.float16, scale) == int((cast == 0).sum()) / 60
    assert one.overflowing(torch.float16, scale) == int(cast.isinf().sum()) / 60
    assert one.overflowing(torch.bfloat16) == one.flushed(torch.bfloat16) == 0.0


@pytest.mark.parametrize("weight", [1.0, 1e-6, 1e-9])
def test_the_recommended_scale_works_and_eight_times_as_much_does_not(weight: float) -> None:
    model = Net()
    found = mpcore.preflight(model, batch(), lambda out: loss_of(out) * weight)
    assert found.dtype == torch.float16
    for one in found.problems(torch.float16, found.loss_scale):
        scale = one.scaled_by(found.loss_scale)
        assert not one.overflows(torch.float16, scale)
        assert one.flushed(torch.float16, scale) < 0.05  # rare values: less than 1 % of all
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


def weight_of(found: Preflight) -> Range:
    return next(one for one in found.ranges if one.kind == "weight")


def found_for(*weights: float, factor: float = 1.0, least: float = 0.0) -> Preflight:
    """Of a layer that has these weights and a batch and a loss that make the rest harmless.

    Inputs below 2^-126 have too few digits in bfloat16: `least` is the smallest.
    """
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    inputs = torch.full((1, len(weights)), max(1 / max(weights) / len(weights), least))
    return mpcore.preflight(model, inputs, lambda out: out.sum() * factor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_are_those_of_casting_at_every_edge(dtype: torch.dtype) -> None:
    """Numbers around the two edges that rounding to nearest even has, and ties themselves."""
    limits = torch.finfo(dtype)
    steps, fine = torch.arange(-40, 41), 2**9 if dtype == torch.float16 else 2**11
    top = torch.tensor(limits.max).view(torch.int32) + steps * fine
    bottom = torch.tensor(limits.smallest_normal * limits.eps / 2).view(torch.int32) + steps
    values = torch.cat([top, bottom]).to(torch.int32).view(torch.float32)
    values = values[values.isfinite()]
    one = range_of("weight", "w", [values])
    for scale in (1.0, 0.5):
        cast = (values * scale).to(dtype)
        assert one.overflowing(dtype, scale) == int(cast.isinf().sum()) / len(values)
        assert one.flushed(dtype, scale) == int((cast == 0).sum()) / len(values)
        assert one.overflows(dtype, scale) == bool(cast.isinf().any())
        assert one.flushes(dtype, scale) == bool((cast == 0).any())
    assert 0 < one.overflowing(dtype) < 1 / 2
    assert 0 < one.flushed(dtype) < 1


@pytest.mark.parametrize(
    ("value", "inside", "too_large"),
    [
        (65519.996, True, {torch.float16: False}),
        (65520.0, False, {torch.float16: True}),
        (65535.0, False, {torch.float16: True}),
        (3.396177e38, False, {torch.float16: True, torch.bfloat16: False}),
        (3.4e38, False, {torch.float16: True, torch.bfloat16: True}),
    ],
)
def test_what_rounds_to_infinity_is_a_problem(
    value: float, inside: bool, too_large: dict[torch.dtype, bool]
) -> None:
    found = found_for(value, 1.0, factor=2.0**10)
    for dtype, expected in too_large.items():
        assert torch.tensor(value).to(dtype).isinf() == expected
        named = [one for one in found.problems(dtype) if one.overflows(dtype)]
        assert (weight_of(found) in named) == expected
        assert weight_of(found).overflowing(dtype) == (0.5 if expected else 0.0)
    if not inside and torch.bfloat16 not in too_large:
        assert "50.0% too large" in str(found)


def test_bfloat16_is_recommended_only_if_it_holds_everything() -> None:
    assert found_for(3.39e38, 1.0, least=1e-36).dtype == torch.bfloat16
    found = found_for(3.4e38, 1.0)
    assert (found.dtype, found.loss_scale) == (torch.float32, 1.0)
    assert "weight weight is too large for bfloat16 as well" in found.reason
    assert "keep_fp32" in found.reason
    assert str(found).startswith("Use float32: ")
    model = Net()
    found = mpcore.preflight(model, batch(), lambda out: loss_of(out) * 1e-30 * 1e-12)
    assert found.dtype == torch.float32
    assert "bfloat16 would lose" in found.reason


def test_every_share_is_listed_the_worst_first() -> None:
    found = found_for(*[1e-9] * 9, *[1.0] * 991)
    assert weight_of(found).flushed(torch.float16) == 0.009
    assert found.problems(torch.float16, found.loss_scale) == [weight_of(found)]
    assert found.dtype == torch.float16
    assert "1 problems, 0 of them infinite, too large or more than 1 % lost" in str(found)
    assert "0.9% lost" in str(found)
    mixed = found_for(*[1e-9] * 9, *[1.0] * 990, 1e5)
    kinds = [one.kind for one in mixed.problems(torch.float16)]
    assert kinds[0] == "weight"  # it overflows; that the inputs make it lose counts less
    with pytest.raises(mpcore.ArgumentError, match="dtype: expected"):
        mixed.problems(torch.float32)


def test_the_text_says_how_many_problems_it_leaves_out_and_counts_those_of_bfloat16() -> None:
    layers = [nn.Linear(4, 4, bias=False) for _ in range(12)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        with torch.no_grad():
            layer.weight[0, 1] = 1e-9
    model = nn.Sequential(*layers)
    found = mpcore.preflight(model, torch.ones(2, 4), lambda out: out.mean())
    problems = found.problems(torch.float16, found.loss_scale)
    assert len(problems) >= 12
    text = str(found)
    assert (
        f"and {len(problems) - 8} more: see problems(torch.float16, {found.loss_scale:g})" in text
    )
    assert "bfloat16 with a loss scale of 1: 0 problems" in text


class Exploding(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        self.l, self.e, self.sign = nn.Linear(4, 4), nn.Identity(), sign

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.e((self.l(x).abs() + 1) * 3e38 * 1e38 * self.sign)
        return torch.tanh(y)


def test_what_is_infinite_in_float32_already_is_the_first_problem() -> None:
    found = mpcore.preflight(Exploding(1.0), batch()[:, :4], lambda out: out.sum())
    assert found.dtype == torch.float32
    assert "activation e is infinite in it already (64 values)" in found.reason
    for dtype in (torch.float16, torch.bfloat16):
        first = found.problems(dtype)[0]
        assert (first.kind, first.name, first.infinite) == ("activation", "e", 64)
    assert "64 values infinite in float32" in str(found)


def test_infinities_of_a_mask_are_no_problem_unless_they_get_into_the_loss() -> None:
    model = Exploding(-1.0)
    assert mpcore.preflight(model, batch()[:, :4], lambda out: out.sum()).dtype == torch.float16
    model = nn.Sequential(nn.Linear(4, 4), nn.LogSigmoid(), Lower())
    found = mpcore.preflight(model, batch()[:, :4], lambda out: out.sum())
    assert found.problems(torch.float16)[0].infinite
    assert found.dtype == torch.float32


class Lower(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.tensor([torch.inf, 0.0, 0.0, 0.0])
