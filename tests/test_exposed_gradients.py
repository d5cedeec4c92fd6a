"""After `unscale_` the gradients in `p.grad` are the float32 ones that the step uses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.exposed import BRAIN, FULL, HALF, SCALE, loss_of, parameters, wrapped
from mpcore_testing.snapshots import snapshot


def clip_norm(params: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(params, 0.5)


def clip_value(params: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_value_(params, 0.125)


def add_noise(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad.add_(torch.linspace(-1, 1, 12).view(param.shape) * 1e-5)


def replace(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = (param.grad * 0.3).contiguous()


def replace_expanded(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.full((), 0.3).expand(param.shape)


def replace_and_edit(params: list[nn.Parameter]) -> None:
    replace(params)
    for param in params:
        param.grad.mul_(-2.0)


def drop_some(params: list[nn.Parameter]) -> None:
    params[0].grad = params[2].grad = None


def edit_by_data(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad.data.clamp_(-0.01, 0.01)
        param.grad.data = param.grad.data * 2


def clip_twice(params: list[nn.Parameter]) -> None:
    clip_norm(params)
    torch.nn.utils.clip_grad_norm_(params, 0.25)


EDITS = [
    *(clip_norm, clip_value, add_noise, replace, replace_expanded, replace_and_edit),
    *(drop_some, edit_by_data, clip_twice),
]


def expected_updates(edit: Callable[[Any], None], steps: int) -> list[Tensor]:
    """Values of float32 twins that plain SGD moved by the same edited gradients."""
    params = parameters()
    twins = [nn.Parameter(p.detach().float().clone()) for p in params]
    groups = [{"params": twins[:1]}, {"params": twins[1:], "lr": 0.25}]
    plain = torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1, foreach=False)
    for number in range(steps):
        for param in params:
            param.grad = None
        (loss_of(params, number) * SCALE).backward()
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.float() / SCALE
        edit(twins)
        plain.step()
        plain.zero_grad()
    return [twin.detach() for twin in twins]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", ["step", "closure", "accumulate", "losses"])
def test_a_step_uses_what_was_done_to_the_gradients(
    engine: Engine, edit: Callable[[Any], None], way: str
) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    loss = optimizer.add_loss("other", mpcore.StaticLossScale(SCALE)) if way == "losses" else None
    for number in range(3):

        def closure(number: int = number) -> None:
            optimizer.zero_grad()
            (optimizer if loss is None else loss).backward(loss_of(params, number))
            if way == "accumulate":
                optimizer.accumulate()
            optimizer.unscale_()
            assert [p.grad.dtype for p in params] == [FULL] * 3
            edit(params)

        if way == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert optimizer.last_step.skipped is False
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in params)
        assert [p.grad_dtype for p in params] == [HALF, BRAIN, FULL]
    for param, expected in zip(params, expected_updates(edit, 3), strict=True):
        master = optimizer.state[param].get("master", param)
        assert engine.agree(master, expected, steps=3)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_step_without_edits_has_the_bits_of_one_that_was_not_unscaled(
    engine: Engine, max_norm: float | None
) -> None:
    seen = []
    for unscales in (False, True):
        params = parameters()
        optimizer = wrapped(engine, params)
        for number in range(3):
            optimizer.backward(loss_of(params, number))
            if unscales:
                optimizer.unscale_()
            if max_norm is not None and number != 1:
                optimizer.clip_grad_norm_(max_norm)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(snapshot(optimizer))
    assert same_bits(*seen)


def test_our_clip_multiplies_what_is_shown_and_another_one_sees_it(engine: Engine) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    optimizer.backward(loss_of(params, 0))
    optimizer.unscale_()
    optimizer.clip_grad_norm_(0.5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    assert norm.item() == pytest.approx(0.5, rel=1e-5)
    assert torch.nn.utils.clip_grad_norm_(params, 1.0).item() == norm.item()
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("way", ["write", "replace"])
def test_what_is_not_finite_after_an_edit_reaches_no_master(
    engine: Engine, value: float, number: int, way: str
) -> None:
    params = parameters()
    optimizer = wrapped(engine, params, scale=mpcore.DynamicLossScale(SCALE))
    optimizer.backward(loss_of(params, 0))
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.backward(loss_of(params, 0))
    optimizer.unscale_()
    if way == "write":
        params[number].grad[1, 1] = value
        params[number].grad[1, 1] *= 2.0
    else:
        params[number].grad = torch.full_like(params[number], value, dtype=FULL) * 2.0
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.last_step.skipped
    group, index = [(0, 0), (1, 0), (1, 1)][number]
    shape = list(params[number].shape)
    assert optimizer.last_step.overflowed() == [f"group {group}, parameter {index}, {shape}"]
    assert optimizer.loss_scale == SCALE / 2
    assert same_bits(snapshot(optimizer), before)


def test_an_overflow_that_torch_clips_to_nan_skips(engine: Engine) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    before = [p.detach().clone() for p in params]
    optimizer.backward(loss_of(params, 0) * torch.inf)
    optimizer.unscale_()
    clip_norm(params)
    optimizer.step()
    assert optimizer.last_step.skipped
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("end", ["step", "zero_grad", "zero_grad(False)", "load", "drop"])
def test_the_own_gradients_come_back(engine: Engine, end: str) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    optimizer.backward(loss_of(params, 0))
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.backward(loss_of(params, 0))
    own = [p.grad for p in params]
    values = [grad.clone() for grad in own[:2]]
    optimizer.unscale_()
    assert all(p.grad is not grad for p, grad in zip(params[:2], own[:2], strict=True))
    if end == "step":
        optimizer.step()
    elif end == "load":
        optimizer.load_state_dict(saved)
    elif end == "drop":
        params[0].grad = None
        optimizer.step()
        assert params[0].grad is None
        own[0] = None
    else:
        optimizer.zero_grad(set_to_none=end == "zero_grad")
    assert [p.grad_dtype for p in params] == [HALF, BRAIN, FULL]
    assert not any(p._backward_hooks for p in params)  # nobody watches any more
    if end == "zero_grad":
        assert [p.grad for p in params] == [None] * 3
    else:
        assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
        zeros = end == "zero_grad(False)"
        for grad, value in zip(own[:2], values, strict=True):
            assert grad is None or torch.equal(grad, value * (not zeros))
    optimizer.zero_grad()
    optimizer.backward(loss_of(params, 1))
    assert [p.grad.dtype for p in params] == [HALF, BRAIN, FULL]


@pytest.mark.parametrize("scaled", [True, False])
def test_a_backward_pass_over_shown_gradients_is_refused(engine: Engine, scaled: bool) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    late = optimizer.scale(loss_of(params, 1)) if scaled else loss_of(params, 1)
    optimizer.backward(loss_of(params, 0))
    optimizer.unscale_()
    shown = [p.grad.clone() for p in params]
    with pytest.raises(
        mpcore.StageError, match=r"^a backward pass to .*: expected .* zero_grad\(\)"
    ):
        late.backward()
    assert all(torch.equal(p.grad, old) for p, old in zip(params, shown, strict=True))
    optimizer.step()
    optimizer.zero_grad()
    loss_of(params, 2).backward()  # nobody watches any more
    assert [p.grad.dtype for p in params] == [HALF, BRAIN, FULL]


@pytest.mark.parametrize("scale", [mpcore.StaticLossScale(SCALE), mpcore.NoLossScale()], ids=str)
def test_a_pass_thrown_away_by_the_model_ends_the_step(engine: Engine, scale: Any) -> None:
    params = parameters()
    optimizer = wrapped(engine, params, scale=scale)
    for number in range(2):
        optimizer.backward(loss_of(params, number))
        optimizer.unscale_()
        for param in params:
            param.grad = None  # as model.zero_grad() does
    optimizer.backward(loss_of(params, 3))
    assert [p.grad.dtype for p in params] == [HALF, BRAIN, FULL]
    optimizer.step()
    assert (optimizer.steps, optimizer.last_step.skipped) == (1, False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_made_while_gradients_are_shown_are_those_of_before_the_step(
    engine: Engine, way: str
) -> None:
    copied = copy.deepcopy if way == "deepcopy" else lambda t: pickle.loads(pickle.dumps(t))
    params = parameters()
    optimizer = wrapped(engine, params)
    optimizer.backward(loss_of(params, 0))
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.backward(loss_of(params, 1))
    optimizer.unscale_()
    other_params, other = copied((params, optimizer))
    assert same_bits(snapshot(other), before)
    assert same_bits(optimizer.state_dict(), other.state_dict())
    assert [p.grad for p in other_params] == [None] * 3
    assert [p.grad_dtype for p in other_params] == [HALF, BRAIN, FULL]
    assert all(master.grad is None for _, master in other._masters.items())
    optimizer.step()
    other.backward(loss_of(other_params, 1))
    other.step()
    assert same_bits(snapshot(other), snapshot(optimizer))


def test_the_route_of_torch_before_grad_dtype(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.data` of the gradient itself is replaced; the object in `p.grad` stays the same."""
    monkeypatch.setattr("mpcore.engine.exposure.HAS_GRAD_DTYPE", False)
    for edit in (clip_norm, clip_value, add_noise, drop_some):
        params = parameters()
        optimizer = wrapped(engine, params)
        for number in range(3):
            optimizer.backward(loss_of(params, number))
            own = [p.grad for p in params]
            optimizer.unscale_()
            assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
            assert [p.grad.dtype for p in params] == [FULL] * 3
            edit(params)
            optimizer.step()
            for param, grad in zip(params, own, strict=True):
                assert param.grad is None or param.grad is grad
                assert grad.dtype == param.dtype
            optimizer.zero_grad()
        for param, expected in zip(params, expected_updates(edit, 3), strict=True):
            master = optimizer.state[param].get("master", param)
            assert engine.agree(master, expected, steps=3)


@pytest.mark.parametrize("edit", [clip_norm, clip_value, replace, drop_some])
def test_a_scaler_around_the_wrapper_shows_them_too(
    engine: Engine, edit: Callable[[Any], None]
) -> None:
    """accelerate's, Trainer's and timm's order of calls."""
    params = parameters()
    optimizer = wrapped(engine, params)
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE)
    for number in range(3):
        scaler.scale(loss_of(params, number)).backward()
        scaler.unscale_(optimizer)
        edit(params)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (optimizer.steps, scaler.skipped_steps) == (3, 0)
    for param, expected in zip(params, expected_updates(edit, 3), strict=True):
        master = optimizer.state[param].get("master", param)
        assert engine.agree(master, expected, steps=3)


def test_a_scaler_around_the_wrapper_sees_an_overflow_in_unscale(engine: Engine) -> None:
    params = parameters()
    optimizer = wrapped(engine, params)
    before = [p.detach().clone() for p in params]
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(params, 0) * torch.inf).backward()
    scaler.unscale_(optimizer)
    clip_norm(params)
    scaler.step(optimizer)
    scaler.update()
    assert (optimizer.last_step.skipped, scaler.get_scale()) == (True, SCALE / 2)
    assert scaler.last_step.skipped
    assert len(scaler.last_step.overflowed()) == 3
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
