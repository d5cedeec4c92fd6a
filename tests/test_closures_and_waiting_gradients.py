"""Closures that bring no gradients, add to gradients that wait for a step, or drop them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.closures import INNERS, SCALE, closure_of, contents, loss_of, make
from mpcore_testing.engines import GENERAL, Engine, engine_cases

DROPPED = r"^step\(closure\): the closure has cleared gradients"


@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
@pytest.mark.parametrize("scale", [SCALE, mpcore.NoLossScale()])
def test_a_closure_that_calls_no_backward_is_a_step_without_gradients(
    engine: Engine, name: str, scale: Any
) -> None:
    params, optimizer = make(engine, name, scale)
    optimizer.step(closure_of(optimizer, params))
    optimizer.zero_grad()
    weights, masters, *_ = contents(params, optimizer)
    numbers = optimizer.state_dict()["mpcore"]
    loss = optimizer.step(lambda: loss_of(params))
    assert loss.item() == loss_of(params).item()
    assert contents(params, optimizer)[:2] == (weights, masters)
    assert optimizer.state_dict()["mpcore"] == numbers
    assert optimizer.last_step is None
    optimizer.step(closure_of(optimizer, params))  # and goes on
    assert contents(params, optimizer)[0] != weights


@pytest.mark.parametrize("missing", [1, 2, 4])
def test_a_later_evaluation_without_backward_is_as_in_torch(missing: int) -> None:
    ours, plain = (nn.Parameter(torch.linspace(0, 1, 6)) for _ in range(2))
    optimizer = GENERAL.wrap(INNERS["LBFGS"]([ours]), mpcore.StaticLossScale(2.0**8))
    other = INNERS["LBFGS"]([plain])

    def closure_for(param: nn.Parameter, owner: Any, backward: Any) -> Callable[[], Tensor]:
        calls: list[int] = []

        def closure() -> Tensor:
            calls.append(1)
            owner.zero_grad()
            loss = loss_of([param])
            if len(calls) != missing:
                backward(loss)
            return loss

        return closure

    for _ in range(3):
        optimizer.step(closure_for(ours, optimizer, optimizer.backward))
        other.step(closure_for(plain, other, lambda loss: loss.backward()))
        assert same_bits(ours.detach(), plain.detach())


@pytest.mark.parametrize("name", ["LBFGS", "LBFGS wolfe", "SGD"])
def test_evaluations_that_clear_nothing_add_up_as_in_torch(name: str) -> None:
    ours, plain = (nn.Parameter(torch.linspace(0, 1, 6)) for _ in range(2))
    optimizer = GENERAL.wrap(INNERS[name]([ours]), mpcore.StaticLossScale(2.0**8))
    other = INNERS[name]([plain])

    def add_ours() -> Tensor:
        loss = loss_of([ours])
        optimizer.backward(loss)
        return loss

    def add_plain() -> Tensor:
        loss = loss_of([plain])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        optimizer.step(add_ours)
        other.step(add_plain)
        assert same_bits(ours.detach(), plain.detach())


def nothing(optimizer: Any, params: list[nn.Parameter]) -> None:
    """Leaves the gradients as the backward pass has left them."""


def clip(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.clip_grad_norm_(0.5)


def edit(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.unscale_()
    for param in params:
        assert param.grad is not None
        param.grad.mul_(0.25)


def add_up(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.accumulate()


BEFORE = [nothing, clip, edit, add_up]


@pytest.mark.parametrize("before", BEFORE)
def test_gradients_that_wait_are_stepped_with_if_the_closure_brings_none(
    engine: Engine, before: Any
) -> None:
    (params, optimizer), (others, other) = make(engine), make(engine)
    for tensors, one in ((params, optimizer), (others, other)):
        for _ in range(2):
            one.backward(loss_of(tensors))
            before(one, tensors)
            if one is optimizer:
                one.step(lambda: loss_of(params))
            else:
                one.step()
            one.zero_grad()
    assert contents(params, optimizer)[:3] == contents(others, other)[:3]
    assert optimizer.state_dict()["mpcore"] == other.state_dict()["mpcore"]


@pytest.mark.parametrize("before", [nothing, add_up])
def test_a_closure_that_clears_nothing_adds_to_gradients_that_wait(
    engine: Engine, before: Any
) -> None:
    (params, optimizer), (others, other) = make(engine), make(engine)

    def add() -> None:
        optimizer.backward(2 * loss_of(params))

    for _ in range(2):
        optimizer.backward(loss_of(params))
        before(optimizer, params)
        optimizer.step(add)
        optimizer.zero_grad()
        other.backward(loss_of(others))
        before(other, others)
        other.backward(2 * loss_of(others))
        other.step()
        other.zero_grad()
    assert contents(params, optimizer)[:3] == contents(others, other)[:3]


@pytest.mark.parametrize("clear", ["optimizer", "in place", "model"])
@pytest.mark.parametrize("before", BEFORE)
def test_a_closure_that_drops_gradients_that_wait_says_so(
    engine: Engine, before: Any, clear: str
) -> None:
    (params, optimizer), (others, other) = make(engine), make(engine)
    optimizer.backward(loss_of(params))
    before(optimizer, params)
    if clear == "model" and before is not nothing:
        return  # gradients that were collected: an error if not all are dropped, sums stay

    def closure() -> Tensor:
        if clear == "model":
            for param in params:
                param.grad = None
        else:
            optimizer.zero_grad(set_to_none=clear == "optimizer")
        loss = loss_of(params)
        optimizer.backward(loss)
        return loss

    with pytest.warns(UserWarning, match=DROPPED):
        optimizer.step(closure)
    other.step(closure_of(other, others))
    assert contents(params, optimizer)[:3] == contents(others, other)[:3]
    with warnings.catch_warnings():  # once a step: nothing waits now
        warnings.simplefilter("error")
        optimizer.zero_grad()
        optimizer.step(closure)


def test_gradients_that_were_cleared_before_do_not_wait(engine: Engine) -> None:
    params, optimizer = make(engine)
    for set_to_none in (True, False):
        optimizer.backward(loss_of(params))
        optimizer.zero_grad(set_to_none=set_to_none)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure_of(optimizer, params))
    assert optimizer.steps == 2


def test_an_overflow_that_a_closure_drops_after_a_look_is_a_skipped_step(engine: Engine) -> None:
    params, optimizer = make(engine)
    optimizer.backward(loss_of(params) * float("inf"))
    optimizer.clip_grad_norm_(1.0)
    with pytest.warns(UserWarning, match=DROPPED):
        optimizer.step(closure_of(optimizer, params))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)


@pytest.mark.parametrize("before", BEFORE)
def test_a_closure_that_raises_before_it_clears_leaves_no_half_step(
    engine: Engine, before: Any
) -> None:
    params, optimizer = make(engine)
    optimizer.step(closure_of(optimizer, params))
    kept = contents(params, optimizer)
    optimizer.zero_grad()
    optimizer.backward(loss_of(params))
    before(optimizer, params)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(stop)
    assert contents(params, optimizer) == kept
    optimizer.zero_grad()
    optimizer.step(closure_of(optimizer, params))
    assert optimizer.steps == 2
    assert copy.deepcopy(optimizer).steps == 2
