"""Closures that raise, forget a step or are never called: one error, and all is as before."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import StageError
from torch import Tensor, nn

from mpcore_testing.closures import INNERS, SCALE, closure_of, contents, loss_of, make
from mpcore_testing.engines import GENERAL, Engine, engine_cases


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("name", "engine", "evaluation"),
    [
        *((*case.values, 1) for case in engine_cases(INNERS)),
        ("LBFGS", GENERAL, 3),
        ("LBFGS wolfe", GENERAL, 2),
    ],
    ids=str,
)
def test_a_closure_that_raises_leaves_everything_as_it_was(
    engine: Engine, name: str, evaluation: int, warm: bool
) -> None:
    params, optimizer = make(engine, name)
    others, other = make(engine, name)
    for _ in range(2 if warm else 0):
        optimizer.step(closure_of(optimizer, params))
        other.step(closure_of(other, others))
    before, numbers = contents(params, optimizer), optimizer.state_dict()["mpcore"]

    def stop(k: int) -> float:
        if k == evaluation:
            raise KeyboardInterrupt("stop")
        return 1.0

    with pytest.raises(KeyboardInterrupt, match="stop"):
        optimizer.step(closure_of(optimizer, params, stop))
    assert contents(params, optimizer) == before
    assert optimizer.state_dict()["mpcore"] == numbers
    for _ in range(2):
        optimizer.step(closure_of(optimizer, params))
        other.step(closure_of(other, others))
    assert contents(params, optimizer)[:3] == contents(others, other)[:3]


def test_a_closure_that_raises_after_clipping_leaves_the_next_step_free(engine: Engine) -> None:
    params, optimizer = make(engine)
    inner = closure_of(optimizer, params)

    def closure() -> Tensor:
        inner()
        optimizer.clip_grad_norm_(1.0)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        optimizer.step(closure)
    for param in params:  # as model.zero_grad() does it
        param.grad = None
    optimizer.backward(loss_of(params))
    optimizer.step()
    assert optimizer.steps == 1


def test_a_closure_that_does_not_scale_is_an_error_and_changes_nothing() -> None:
    params, optimizer = make(GENERAL, "LBFGS")
    before = contents(params, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    with pytest.raises(StageError, match=r"expected gradients of a scaled loss"):
        optimizer.step(closure)
    assert contents(params, optimizer) == before


class Ignores(torch.optim.SGD):
    """An optimizer that takes a closure and never calls it."""

    def step(self, closure: Any = None) -> None:
        super().step()


def test_an_inner_optimizer_that_never_calls_the_closure_is_an_error() -> None:
    params = [nn.Parameter(torch.ones(3).half())]
    optimizer = GENERAL.wrap(Ignores(params, lr=0.1), SCALE)
    before = contents(params, optimizer)
    with pytest.raises(StageError, match="closure"):
        optimizer.step(lambda: None)
    assert contents(params, optimizer) == before


class Breaks(torch.optim.SGD):
    """An optimizer that fails between evaluating the closure and updating."""

    broken = True

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.broken:
            raise ValueError("stop")
        super().step()


def test_gradients_of_a_step_that_broke_are_not_used_by_the_next_one() -> None:
    params = [nn.Parameter(torch.ones(6).half()) for _ in range(3)]
    inner = Breaks(params, lr=0.25)
    optimizer = GENERAL.wrap(inner, SCALE)
    with pytest.raises(ValueError, match="stop"):
        optimizer.step(closure_of(optimizer, params))
    inner.broken = False
    optimizer.zero_grad()
    optimizer.backward(params[0].float().sum())
    optimizer.step()
    assert params[0].tolist() == [0.75] * 6
    assert all(param.tolist() == [1.0] * 6 for param in params[1:])
    assert all(state["master"].grad is None for state in optimizer.state.values())


def test_a_refused_evaluation_gives_gradients_that_were_shown_back(engine: Engine) -> None:
    params = [nn.Parameter(torch.ones(2).half()) for _ in range(2)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.5), mpcore.StaticLossScale(4.0))
    own: list[Any] = []

    def closure() -> None:
        optimizer.zero_grad()
        optimizer.backward(torch.stack([p.float().sum() for p in params]).sum())
        own[:] = [p.grad for p in params]
        optimizer.unscale_()
        with torch.no_grad():
            params[1][0] = torch.nan

    with pytest.raises(StageError, match="expected finite numbers"):
        optimizer.step(closure)
    assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
    assert [p.grad_dtype for p in params] == [torch.float16] * 2
