"""Sharpness-aware optimizers: two calls make a step, and an overflow in either pass skips both."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import StageError
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.two_steps import Twins, loss

GENERAL = [engine for engine in ENGINES if not engine.fused]


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_both_steps_are_near_those_in_float32(engine: Engine, clear: bool) -> None:
    twins = Twins(engine)
    start = twins.masters()
    for batch in range(12):
        twins.step(batch, clear=clear)
        twins.expect_close()
    moved = [(a - b).abs().max() for a, b in zip(start, twins.masters(), strict=True)]
    assert min(moved) > 0.2
    assert (twins.optimizer.steps, twins.optimizer.skipped_steps) == (12, 0)
    assert twins.optimizer.loss_scale == 2.0**13  # grew every four steps, not every four passes


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("clears", ["zeros", "data"])
@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_gradients_that_the_first_step_fills_with_zeros_are_zeros_in_the_second(
    engine: Engine, clears: str, closure: bool
) -> None:
    twins = Twins(engine)
    twins.optimizer.inner.clears = twins.plain.clears = clears
    for batch in range(6):
        if not closure:
            twins.step(batch, clear=True)
            continue
        twins.backward(batch)
        twins.optimizer.step(lambda batch=batch: twins.backward(batch))
        twins.optimizer.zero_grad()
        loss(twins.copies, batch).backward()
        twins.plain.step(lambda batch=batch: loss(twins.copies, batch).backward())
        twins.plain.zero_grad()
    twins.expect_close()


@pytest.mark.parametrize("overflow", [1, 2])
@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_a_loop_that_clears_by_zero_grad_of_the_two_alone_goes_on_after_an_overflow(
    engine: Engine, overflow: int
) -> None:
    twins = Twins(engine)
    for batch in range(6):
        skips = batch in (0, 3)
        for number, name in enumerate(("first_step", "second_step"), 1):
            twins.backward(batch, overflow=skips and number == overflow)
            getattr(twins.optimizer, name)(zero_grad=True)
            if not skips:
                loss(twins.copies, batch).backward()
                getattr(twins.plain, name)(zero_grad=True)
            assert all(param.grad is None for param in twins.params)
        assert twins.optimizer.last_step.skipped == skips
    twins.expect_close()
    assert twins.optimizer.skipped_steps == 2


def test_the_climb_is_what_makes_them_near() -> None:
    twins, flat = Twins(GENERAL[0]), Twins(GENERAL[0])
    for group in flat.optimizer.param_groups:
        group["rho"] = 0.0
    for batch in range(12):
        twins.step(batch, clear=True)
        flat.optimizer.param_groups[0]["rho"] = 0.0
        flat.step(batch, clear=True)
    apart = [(a - b).abs().max() for a, b in zip(twins.masters(), flat.masters(), strict=True)]
    assert min(apart) > 5e-3


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("overflow", [1, 2])
@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_an_overflow_in_either_pass_skips_both(engine: Engine, overflow: int, clear: bool) -> None:
    twins = Twins(engine)
    twins.step(0, clear=True)
    before, weights = twins.masters(), [p.detach().clone() for p in twins.params]
    twins.step(1, clear=clear, overflow=overflow)
    assert all(map(same_bits, twins.masters(), before))
    assert all(same_bits(p.detach(), w) for p, w in zip(twins.params, weights, strict=True))
    assert (twins.optimizer.steps, twins.optimizer.skipped_steps) == (2, 1)
    assert twins.optimizer.loss_scale == 2.0**9
    assert twins.optimizer.last_step.skipped
    for batch in range(2, 8):
        twins.step(batch, clear=True)
    twins.expect_close()


def test_an_overflow_in_the_very_first_pass_skips_both() -> None:
    twins = Twins(GENERAL[0])
    twins.step(0, clear=True, overflow=1)
    twins.step(1, clear=False)
    twins.expect_close()
    assert (twins.optimizer.steps, twins.optimizer.skipped_steps) == (2, 1)


@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_a_closure_after_a_pass_makes_both_steps(engine: Engine) -> None:
    twins = Twins(engine)
    for batch in range(6):
        skip = batch == 2
        twins.backward(batch, overflow=skip)
        calls: list[int] = []

        def closure(batch: int = batch, calls: list[int] = calls) -> None:
            calls.append(batch)
            twins.optimizer.backward(loss(twins.params, batch))

        twins.optimizer.step(closure)
        twins.optimizer.zero_grad()
        assert len(calls) == (not skip)
        if skip:
            continue
        loss(twins.copies, batch).backward()
        twins.plain.step(lambda batch=batch: loss(twins.copies, batch).backward())
        twins.plain.zero_grad()
    twins.expect_close()
    assert (twins.optimizer.steps, twins.optimizer.skipped_steps) == (6, 1)


@pytest.mark.parametrize("how", ["clip", "unscale", "accumulate", "two losses"])
@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_what_waits_is_the_first_pass_whatever_was_done_to_it(engine: Engine, how: str) -> None:
    twins = Twins(engine)
    optimizer = twins.optimizer
    other = optimizer.add_loss("other", mpcore.StaticLossScale(2.0**6))

    def add(batch: int) -> None:
        twins.backward(batch)
        if how == "two losses":
            other.backward(loss(twins.params, 1))

    for batch in range(6):
        add(batch)
        loss(twins.copies, batch).backward()
        if how == "clip":
            optimizer.clip_grad_norm_(0.25)
        elif how == "unscale":
            optimizer.unscale_()
            torch.nn.utils.clip_grad_norm_(twins.params, 0.25)
        elif how == "accumulate":
            optimizer.accumulate()
            twins.backward(5)
            loss(twins.copies, 5).backward()
        if how in ("clip", "unscale"):
            torch.nn.utils.clip_grad_norm_(twins.copies, 0.25)
        optimizer.step(lambda batch=batch: add(batch))
        optimizer.zero_grad()

        def closure(batch: int = batch) -> None:
            loss(twins.copies, batch).backward()
            if how == "two losses":
                loss(twins.copies, 1).backward()

        if how == "two losses":
            loss(twins.copies, 1).backward()
        twins.plain.step(closure)
        twins.plain.zero_grad()
    twins.expect_close()
    assert (optimizer.steps, optimizer.skipped_steps) == (6, 0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("engine", GENERAL, ids=str)
def test_without_a_scale_a_pass_of_the_users_own_is_the_first_one(
    engine: Engine, set_to_none: bool
) -> None:
    twins = Twins(engine, mpcore.NoLossScale())
    for batch in range(6):
        for params, optimizer in (
            (twins.params, twins.optimizer),
            (twins.copies, twins.plain),
        ):
            loss(params, batch).backward()
            optimizer.step(lambda params=params, batch=batch: loss(params, batch).backward())
            optimizer.zero_grad(set_to_none=set_to_none)
    twins.expect_close()


@pytest.mark.parametrize("how", ["clip", "unscale", "accumulate"])
def test_gradients_are_clipped_edited_and_added_up_before_either_step(how: str) -> None:
    twins = Twins(GENERAL[0])

    def prepare() -> None:
        if how == "clip":
            twins.optimizer.clip_grad_norm_(0.25)
        elif how == "unscale":
            twins.optimizer.unscale_()
            torch.nn.utils.clip_grad_norm_(twins.params, 0.25)
        else:
            twins.optimizer.accumulate()
            twins.backward(5)
            twins.optimizer.accumulate()

    def prepare_plain() -> None:
        if how == "accumulate":
            loss(twins.copies, 5).backward()
        else:
            torch.nn.utils.clip_grad_norm_(twins.copies, 0.25)

    for batch in range(6):
        for ours in (twins.optimizer.first_step, twins.optimizer.second_step):
            twins.backward(batch)
            prepare()
            ours(zero_grad=True)
            assert all(p.grad is None for p in twins.params)
        for plain in (twins.plain.first_step, twins.plain.second_step):
            loss(twins.copies, batch).backward()
            prepare_plain()
            plain(zero_grad=True)
        twins.expect_close()


def test_between_the_two_steps_everything_else_waits() -> None:
    twins = Twins(GENERAL[0])
    optimizer = twins.optimizer
    with pytest.raises(StageError, match=r"^second_step\(\): expected first_step\(\) before it"):
        optimizer.second_step()
    twins.backward(0)
    optimizer.first_step(zero_grad=True)
    more = {"params": [nn.Parameter(torch.ones(2))]}
    calls = (
        optimizer.step,
        optimizer.state_dict,
        lambda: copy.deepcopy(optimizer),
        lambda: optimizer.add_param_group(more),
    )
    for call in calls:
        with pytest.raises(StageError, match=r"between first_step\(\) and second_step\(\)"):
            call()
    twins.backward(0)  # what the message says
    optimizer.second_step(zero_grad=True)
    assert copy.deepcopy(optimizer).state_dict()["mpcore"] == optimizer.state_dict()["mpcore"]
    twins.backward(1)
    with pytest.raises(StageError, match=r"^second_step\(\): expected first_step\(\) before it"):
        optimizer.second_step()
    optimizer.zero_grad()
    twins.step(1, clear=True)


def test_a_loop_that_breaks_off_between_them_begins_anew() -> None:
    twins = Twins(GENERAL[0])
    twins.step(0, clear=True)
    saved, before = copy.deepcopy(twins.optimizer.state_dict()), twins.masters()
    for batch in (7, 1):  # the second pass never comes
        twins.backward(batch)
        twins.optimizer.first_step(zero_grad=True)
        assert not all(map(same_bits, twins.masters(), before))
        old = [twins.optimizer.state[param]["old"] for param in twins.params]
        assert all(map(same_bits, old, before))
    twins.optimizer.load_state_dict(saved)
    twins.optimizer.state_dict()  # the climb is forgotten


def test_a_first_step_that_fails_is_undone_and_a_second_one_poisons() -> None:
    twins, other = Twins(GENERAL[0]), Twins(GENERAL[0])
    twins.step(0, clear=True)
    other.step(0, clear=True)
    inner = twins.optimizer.inner

    def fail(**_: Any) -> None:
        inner._all()[0].data.add_(1.0)
        raise KeyboardInterrupt

    twins.backward(1)
    inner.zero_grad = fail
    with pytest.raises(KeyboardInterrupt):
        twins.optimizer.first_step(zero_grad=True)
    del inner.zero_grad
    twins.optimizer.zero_grad()
    assert all(map(same_bits, twins.masters(), other.masters()))
    twins.step(1, clear=True)
    other.step(1, clear=True)
    assert all(map(same_bits, twins.masters(), other.masters()))
    saved = copy.deepcopy(twins.optimizer.state_dict())
    twins.backward(2)
    twins.optimizer.first_step(zero_grad=True)
    twins.backward(2)
    inner.base.step = fail
    with pytest.raises(KeyboardInterrupt):
        twins.optimizer.second_step()
    del inner.base.step
    with pytest.raises(StageError, match="load_state_dict"):
        twins.optimizer.state_dict()
    twins.optimizer.load_state_dict(saved)
    twins.optimizer.sync_masters_from_model()


def test_a_second_pass_without_gradients_goes_back() -> None:
    twins = Twins(GENERAL[0])
    twins.step(0, clear=True)
    before = twins.masters()
    twins.backward(1)
    twins.optimizer.first_step(zero_grad=True)
    assert twins.optimizer.second_step() is None
    assert all(map(same_bits, twins.masters(), before))
    assert twins.optimizer.steps == 1


def test_wrong_arguments_of_either_are_told_before_anything_is_written() -> None:
    twins, other = Twins(GENERAL[0]), Twins(GENERAL[0])
    twins.backward(0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clear'"):
        twins.optimizer.first_step(clear=True)
    twins.optimizer.first_step(zero_grad=True)
    twins.backward(0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clear'"):
        twins.optimizer.second_step(clear=True)
    twins.optimizer.second_step(zero_grad=True)
    other.step(0, clear=True)
    assert all(map(same_bits, twins.masters(), other.masters()))
