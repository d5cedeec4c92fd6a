"""One clip of the global norm over several optimizers under one scaler, which skip together."""

from __future__ import annotations

import math
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.syncs import ScalarReads

SCALE = 256.0
INF = float("inf")


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)).to(dtype)


def optimizers(net: Any, wrap: bool = True) -> list[Any]:
    """Muon for matrices, AdamW for the rest."""
    muon = torch.optim.Muon([net[0].weight, net[2].weight], lr=1e-2)
    adamw = torch.optim.AdamW([net[0].bias, net[2].bias], lr=1e-2)
    made: list[Any] = [muon, adamw]
    if not wrap:
        return made
    return [mpcore.MixedPrecisionOptimizer(each, path="general") for each in made]


def loss_of(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    dtype = next(net.parameters()).dtype
    return net(x.to(dtype)).float().square().mean()


def scaler() -> mpcore.GradScaler:
    return mpcore.GradScaler("cpu", init_scale=SCALE)


def masters(net: nn.Module, made: list[Any]) -> list[Tensor]:
    shown = {p: each.state[p] for each in made for g in each.param_groups for p in g["params"]}
    return [shown[param].get("master", param) for param in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_masters_are_those_of_float32_twins_with_one_clip(
    dtype: torch.dtype, max_norm: float
) -> None:
    net, twin = model(dtype), model(dtype).float()
    made, plain = optimizers(net), optimizers(twin, wrap=False)
    scaling = scaler()
    for step in range(6):
        scaling.scale(loss_of(net, step)).backward()
        for param, copy in zip(net.parameters(), twin.parameters(), strict=True):
            copy.grad = param.grad.float() / SCALE
        squares = [np.square(p.grad.double().numpy()).sum() for p in twin.parameters()]
        norm = scaling.clip_grad_norm_(made, max_norm)
        assert norm.item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
        in_order = [p for each in plain for group in each.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(in_order, max_norm)
        for param, copy in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param.grad, copy.grad)
        for each in made:
            scaling.step(each)
            each.zero_grad()
        scaling.update()
        for each in plain:
            each.step()
    assert all(map(torch.equal, masters(net, made), twin.parameters()))


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("value", [INF, float("nan")])
@pytest.mark.parametrize("bad", [0, 1])
def test_all_skip_together_if_one_overflows(wrap: bool, value: float, bad: int) -> None:
    net = model(torch.float16 if wrap else torch.float32)
    made, scaling = optimizers(net, wrap), scaler()
    for step in range(2):
        scaling.scale(loss_of(net, step)).backward()
        before = [p.detach().clone() for p in net.parameters()]
        kept = {each: dict(each.state_dict()["state"]) for each in made}
        if step == 1:
            made[bad].param_groups[0]["params"][1].grad.view(-1)[0] = value
        norm = scaling.clip_grad_norm_(made, 1.0)
        for each in made:
            scaling.step(each)
        scaling.update()
        assert math.isfinite(norm) == (step == 0)
        assert [scaling.last_step_of(each).skipped for each in made] == [step == 1] * 2
        for each in made:
            each.zero_grad()
    assert all(map(torch.equal, before, net.parameters()))
    assert [each.state_dict()["state"].keys() for each in made] == [kept[e].keys() for e in made]
    assert scaling.last_step_of(made[1 - bad]).overflowed() == []
    assert len(scaling.last_step_of(made[bad]).overflowed()) == 1
    assert scaling.get_scale() == SCALE / 2
    if wrap:
        assert [each.skipped_steps for each in made] == [1, 1]
        assert made[1 - bad].last_step.overflowed() == []


@pytest.mark.parametrize("value", [INF, float("nan")])
def test_torch_steps_the_others_with_what_such_a_clip_has_left(value: float) -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    made = [torch.optim.SGD([w], lr=1.0, weight_decay=0.5) for w in weights]
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(weights[0].sum() + weights[1].sum()).backward()
    weights[0].grad[0] = value
    for each in made:
        theirs.unscale_(each)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for each in made:
        theirs.step(each)
    assert weights[0].tolist() == [1.0, 1.0]
    expected = [0.5, 0.5] if value == INF else [value, value]  # nothing but weight decay; NaN
    torch.testing.assert_close(weights[1].detach(), torch.tensor(expected), equal_nan=True)


def test_a_norm_that_overflows_skips_although_no_gradient_does() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    made = [torch.optim.SGD([w], lr=1.0) for w in weights]
    scaling = mpcore.GradScaler("cpu", init_scale=1.0)
    scaling.scale(weights[0].sum() + weights[1].sum()).backward()
    weights[0].grad.fill_(1e30)
    assert scaling.clip_grad_norm_(made, 1.0).isinf()
    for each in made:
        scaling.step(each)
    scaling.update()
    assert [w.tolist() for w in weights] == [[1.0, 1.0]] * 2
    assert scaling.get_scale() == 0.5


def test_those_unscaled_before_are_not_unscaled_again_and_nothing_syncs() -> None:
    reads = []
    for clip in (False, True):
        net = model(torch.float16)
        made, scaling = optimizers(net), scaler()
        scaling.scale(loss_of(net, 0)).backward()
        expected = [p.grad.float() / SCALE for p in net.parameters()]
        scaling.unscale_(made[0])
        with ScalarReads() as counted:
            norm = scaling.clip_grad_norm_(made, 1e6) if clip else scaling.unscale_(made[1])
        reads.append(counted.count)
    assert reads[0] == reads[1], "on a CPU, where masters are made and C reads addresses"
    assert all(map(torch.equal, expected, (p.grad for p in net.parameters())))
    assert torch.equal(norm, scaling.clip_grad_norm_(made, 1e6)), "a second clip is one more clip"


def test_an_overflow_that_somebody_has_wiped_away_skips_all_the_same() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    made = [torch.optim.SGD([w], lr=1.0) for w in weights]
    scaling = scaler()
    scaling.scale(weights[0].sum() * INF + weights[1].sum()).backward()
    scaling.unscale_(made[0])
    weights[0].grad.zero_()
    assert scaling.clip_grad_norm_(made, 1.0).isfinite()
    for each in made:
        scaling.step(each)
    assert [w.tolist() for w in weights] == [[1.0, 1.0]] * 2


def test_a_disabled_scaler_clips_what_is_there() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    made = [torch.optim.SGD([w], lr=1.0) for w in weights]
    scaling = mpcore.GradScaler("cpu", enabled=False)
    scaling.scale((weights[0] * 3 + weights[1] * 4).sum()).backward()
    assert scaling.clip_grad_norm_(made, 0.5).item() == 5.0
    assert [w.grad.item() for w in weights] == pytest.approx([0.3, 0.4], rel=1e-6)


def test_optimizers_without_any_gradient_have_a_norm_of_0() -> None:
    net = model(torch.float16)
    made, scaling = optimizers(net), scaler()
    scaling.scale(torch.ones(1))
    assert scaling.clip_grad_norm_(made, 1.0).item() == 0.0


def test_what_cannot_be_clipped_together_is_refused_and_nothing_has_changed() -> None:
    net = model(torch.float16)
    made, scaling = optimizers(net), scaler()
    scaling.scale(loss_of(net, 0)).backward()
    before = [p.grad.clone() for p in net.parameters()]
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (made[0], 1.0, mpcore.ArgumentTypeError, r"a list of optimizers, got MixedPrecision"),
        (list(net.parameters()), 1.0, mpcore.ArgumentTypeError, "a list of optimizers"),
        ([made[0], made[0]], 1.0, mpcore.ArgumentError, "each optimizer once, got 2 with 1"),
        ([], 1.0, mpcore.ArgumentError, "got 0 with 0"),
        (made, 0.0, mpcore.ArgumentError, "above 0, got 0"),
        (made, "1", mpcore.ArgumentTypeError, "max_norm"),
    ]
    for given, max_norm, kind, message in cases:
        with pytest.raises(kind, match=message):
            scaling.clip_grad_norm_(given, max_norm)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler().clip_grad_norm_(made, 1.0)
    assert all(map(torch.equal, before, (p.grad for p in net.parameters())))
    of_ranks = mpcore.GradScaler("cpu", process_group=object())
    with pytest.raises(mpcore.ArgumentError, match="without process_group"):
        of_ranks.clip_grad_norm_(made, 1.0)


def test_a_dtensor_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    weight.device_mesh = object()  # what tells one
    with pytest.raises(mpcore.ArgumentError, match="has whole, got a DTensor"):
        scaler().clip_grad_norm_([torch.optim.SGD([weight], lr=1.0)], 1.0)


def test_a_parameter_that_two_optimizers_share_is_refused_and_nothing_has_changed() -> None:
    shared, own = (nn.Parameter(torch.ones(4)) for _ in range(2))
    made = [torch.optim.SGD([shared], lr=1.0), torch.optim.SGD([shared, own], lr=1.0)]
    scaling = mpcore.GradScaler("cpu", init_scale=8.0)
    scaling.scale(shared.sum() * 2 + own.sum()).backward()
    for _ in range(2):
        with pytest.raises(mpcore.ArgumentError, match=r"once, got one of shape \[4\] twice"):
            scaling.clip_grad_norm_(made, 100.0)
    assert (shared.grad.tolist(), own.grad.tolist()) == ([16.0] * 4, [8.0] * 4)
    assert scaling.clip_grad_norm_(made[1:], 100.0).item() == pytest.approx(math.sqrt(20))


def test_a_shared_parameter_without_a_gradient_is_no_matter() -> None:
    shared, *own = (nn.Parameter(torch.ones(1)) for _ in range(3))
    made = [torch.optim.SGD([shared, each], lr=1.0) for each in own]
    scaling = mpcore.GradScaler("cpu", init_scale=8.0)
    scaling.scale((own[0] * 3 + own[1] * 4).sum()).backward()
    assert scaling.clip_grad_norm_(made, 100.0).item() == 5.0
