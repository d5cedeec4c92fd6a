"""A loop that steps only if the norm is finite: the scale falls all the same."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine

RULE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=2)
KINDS = [RULE, mpcore.HeadroomLossScale(2.0**8), mpcore.StaticLossScale(4.0), mpcore.NoLossScale()]
LOOKS: dict[str, Any] = {
    "clip": lambda optimizer: optimizer.clip_grad_norm_(1.0),
    "unscale_": lambda optimizer: optimizer.unscale_(),
    "sums": lambda optimizer: (optimizer.accumulate(), optimizer.unscale_()),
}
CLEARS = ["zero_grad", "zero_grad(False)", "model"]


def make(engine: Engine, scale: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(torch.zeros(3).to(d)) for d in (torch.float16, torch.float32)]
    return params, engine.wrap(torch.optim.SGD(params, lr=1.0), scale)


def clear(way: str, params: list[nn.Parameter], optimizer: Any) -> None:
    if way == "model":
        for param in params:
            param.grad = None
        optimizer.scale(torch.ones(()))  # which notices that the pass is gone
    else:
        optimizer.zero_grad(set_to_none=way == "zero_grad")


def run(optimizer: Any, params: list[nn.Parameter], size: float, look: str) -> None:
    optimizer.backward(sum(p.float().sum() for p in params) * size)
    LOOKS[look](optimizer)


@pytest.mark.parametrize("scale", KINDS, ids=str)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("way", CLEARS)
def test_an_overflow_that_was_seen_and_not_stepped_is_a_skipped_step(
    engine: Engine, scale: Any, look: str, way: str
) -> None:
    if way == "model" and (look == "clip" or isinstance(scale, mpcore.NoLossScale)):
        pytest.skip("nothing tells that model.zero_grad() was called")
    numbers = []
    for steps in (True, False):
        params, optimizer = make(engine, scale)
        for size in (1.0, torch.inf, 1.0, torch.nan, torch.inf, 1.0):
            run(optimizer, params, size, look)
            if steps or size == 1.0:
                optimizer.step()
                optimizer.zero_grad()
            else:
                clear(way, params, optimizer)
        numbers.append((optimizer.state_dict()["mpcore"], [p.tolist() for p in params]))
    assert same_bits(*numbers)
    assert numbers[0][0]["loss_scale"]["skipped_steps"] == 3


@pytest.mark.parametrize("scale", KINDS, ids=str)
@pytest.mark.parametrize("look", [*LOOKS, None])
def test_a_clean_pass_that_is_thrown_away_counts_as_nothing(
    engine: Engine, scale: Any, look: str | None
) -> None:
    params, optimizer = make(engine, scale)
    run(optimizer, params, 1.0, "clip")
    optimizer.step()
    before = optimizer.state_dict()["mpcore"]
    for _ in range(3):
        optimizer.zero_grad()
        if look is not None:
            run(optimizer, params, 1.0, look)
    optimizer.zero_grad()
    assert same_bits(optimizer.state_dict()["mpcore"], before)


def test_only_losses_that_overflowed_back_off(engine: Engine) -> None:
    params, optimizer = make(engine, RULE)
    loss = optimizer.add_loss("other", RULE)
    loss.backward(params[0].float().sum() * torch.inf)
    optimizer.backward(params[1].sum())
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    assert (optimizer.loss_scale, loss.loss_scale) == (2.0**8, 2.0**7)
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)


def test_a_scale_that_raises_at_its_minimum_does_so_when_gradients_are_cleared(
    engine: Engine,
) -> None:
    params, optimizer = make(engine, mpcore.DynamicLossScale(1.0, at_min="raise"))
    run(optimizer, params, torch.inf, "clip")
    with pytest.raises(mpcore.LossScaleError):
        optimizer.zero_grad()
    assert [p.grad for p in params] == [None, None]
    run(optimizer, params, 1.0, "clip")
    optimizer.step()
    assert optimizer.last_step.skipped is False


def test_an_outside_scaler_counts_for_itself(engine: Engine) -> None:
    params, optimizer = make(engine, RULE)
    scaler = mpcore.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum(p.float().sum() for p in params) * torch.inf).backward()
    scaler.unscale_(optimizer)
    optimizer.zero_grad()
    scaler.update()
    assert (optimizer.loss_scale, optimizer.steps, scaler.get_scale()) == (2.0**8, 0, 2.0)


@pytest.mark.parametrize("scale", KINDS, ids=str)
@pytest.mark.parametrize("look", LOOKS)
def test_a_step_whose_gradients_were_all_dropped_after_an_overflow_is_a_skipped_one(
    engine: Engine, scale: Any, look: str
) -> None:
    numbers = []
    for drops in (False, True):
        params, optimizer = make(engine, scale)
        for size in (1.0, torch.inf, 1.0, torch.nan):
            run(optimizer, params, size, look)
            if drops and size != 1.0:
                for param in params:
                    param.grad = None
            optimizer.step()
            assert not drops or size == 1.0 or optimizer.last_step is None
            optimizer.zero_grad()
        numbers.append(optimizer.state_dict()["mpcore"])
    assert same_bits(*numbers)
    assert numbers[1]["loss_scale"]["skipped_steps"] == 2


@pytest.mark.parametrize("look", LOOKS)
def test_an_overflow_is_not_forgotten_when_clearing_gradients_fails(
    engine: Engine, look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = make(engine, RULE)
    run(optimizer, params, torch.inf, look)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mpcore.engine.scale_moves.ScaleMoves.count_if_skipped", fail)
        with pytest.raises(KeyboardInterrupt):
            optimizer.zero_grad()
    optimizer.zero_grad()
    assert (optimizer.loss_scale, optimizer.skipped_steps) == (2.0**7, 1)
    run(optimizer, params, 1.0, look)
    optimizer.step()
    assert (optimizer.steps, optimizer.last_step.skipped) == (2, False)


def with_two_losses(engine: Engine) -> tuple[list[nn.Parameter], Any, Any]:
    """After a step of both; the next clean one lets both scales grow."""
    params, optimizer = make(engine, RULE)
    loss = optimizer.add_loss("other", RULE)
    optimizer.backward(params[1].sum())
    loss.backward(params[0].float().sum())
    optimizer.step()
    optimizer.zero_grad()
    return params, optimizer, loss


def test_a_clean_pass_of_several_losses_that_is_thrown_away_counts_as_nothing(
    engine: Engine,
) -> None:
    params, optimizer, loss = with_two_losses(engine)
    before = optimizer.state_dict()["mpcore"]
    optimizer.backward(params[1].sum())
    loss.backward(params[0].float().sum())
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    assert same_bits(optimizer.state_dict()["mpcore"], before)


def test_an_exception_while_a_pass_is_thrown_away_moves_no_scale(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer, loss = with_two_losses(engine)
    before = optimizer.state_dict()["mpcore"]
    loss.backward(params[0].float().sum() * torch.inf)
    optimizer.clip_grad_norm_(1.0)

    def fails(counters: Any, found_inf: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mpcore.engine.scale_moves.count_step_", fails)  # after the scales have moved
        with pytest.raises(MemoryError):
            optimizer.zero_grad()
    assert [p.grad for p in params] == [None, None]
    assert same_bits(optimizer.state_dict()["mpcore"], before)


def test_a_pass_of_which_a_gradient_is_left_is_not_thrown_away(engine: Engine) -> None:
    params, optimizer = make(engine, RULE)
    run(optimizer, params, 1.0, "unscale_")
    params[0].grad = None
    with pytest.raises(mpcore.StageError, match=r"^scale\(\): expected to be called before"):
        optimizer.scale(torch.ones(()))
    optimizer.step()
    assert [p.tolist() for p in params] == [[0.0] * 3, [-1.0] * 3]
