"""Gradients that nobody cleared: the next pass adds to them, whatever the scale is by then."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.engines import Engine

GROWS = mpcore.DynamicLossScale(init=2.0**4, growth_interval=1)
KINDS = [GROWS, mpcore.StaticLossScale(2.0**4), mpcore.HeadroomLossScale(2.0**4)]


def make(engine: Engine, scale: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(torch.zeros(3).to(d)) for d in (torch.float16, torch.float32)]
    return params, engine.wrap(torch.optim.SGD(params, lr=1.0), scale)


@pytest.mark.parametrize("scale", KINDS, ids=str)
@pytest.mark.parametrize("unscales", [False, True])
def test_sums_of_steps_without_zero_grad_are_those_of_torch(
    engine: Engine, scale: Any, unscales: bool
) -> None:
    params, optimizer = make(engine, scale)
    twins = [nn.Parameter(torch.zeros(3)) for _ in params]
    plain = torch.optim.SGD(twins, lr=1.0)
    for number in range(1, 5):
        optimizer.backward(sum(p.float().sum() for p in params) * number)
        if unscales:
            optimizer.unscale_()
        optimizer.step()
        sum((t.sum() for t in twins), torch.zeros(())).mul(number).backward()
        plain.step()
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(optimizer.state.get(param, {}).get("master", param), twin)


@pytest.mark.parametrize("clears", ["None", "zeros", "data", "late", "by hand"])
def test_what_was_cleared_is_not_added(engine: Engine, clears: str) -> None:
    params, optimizer = make(engine, GROWS)
    for number in range(1, 5):
        before = [p.detach().clone() for p in params]
        loss = optimizer.scale(sum(p.float().sum() for p in params) * number)
        if clears == "late":  # between scale() and the pass
            for param in params:
                param.grad = None
        loss.backward()
        optimizer.step()
        assert all((old - p == number).all() for p, old in zip(params, before, strict=True))
        for param in params:
            if clears == "None":
                param.grad = None
            elif clears == "zeros":
                param.grad.zero_()
            elif clears == "data":
                param.grad.data.zero_()
            elif clears == "by hand":
                param.grad = torch.zeros_like(param)


def test_a_gradient_put_there_after_the_step_is_not_touched(engine: Engine) -> None:
    params, optimizer = make(engine, GROWS)
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    mine = [torch.ones_like(p) for p in params]
    for param, grad in zip(params, mine, strict=True):
        param.grad = grad
    optimizer.scale(torch.ones(()))
    assert all((grad == 1).all() for grad in mine)


def test_passes_of_one_step_are_added_as_ever(engine: Engine) -> None:
    params, optimizer = make(engine, GROWS)
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    for _ in range(3):  # the first one adds to what the step has left
        optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    assert all((p == -1 - 4).all() for p in params)


@pytest.mark.parametrize("written", [slice(None), slice(1), slice(1, None)], ids=str)
def test_a_gradient_that_was_written_to_after_the_step_is_added_as_it_is(
    engine: Engine, written: slice
) -> None:
    params, optimizer = make(engine, GROWS)
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    for param in params[written]:  # the others follow the scale
        param.grad.fill_(optimizer.loss_scale)  # by somebody who knows the scale of the next pass
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    assert all((p == -1 - 2).all() for p in params)


def test_an_expanded_gradient_that_is_left_is_multiplied_once(engine: Engine) -> None:
    params, optimizer = make(engine, GROWS)
    optimizer.scale(torch.ones(()))
    for param in params:
        param.grad = torch.full((), optimizer.loss_scale, dtype=param.dtype).expand(3)
    optimizer.step()
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    assert all((p == -1 - 2).all() for p in params)


def test_an_exception_while_they_are_multiplied_leaves_no_gradients_to_step_with(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = make(engine, GROWS)
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()

    def fails(grads: Any, factor: Any, backend: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mpcore.engine.leftovers._multiply_", fails)
        with pytest.raises(MemoryError):
            optimizer.scale(torch.ones(()))
    for call in (optimizer.step, lambda: optimizer.scale(torch.ones(()))):
        with pytest.raises(mpcore.StageError, match=r"left half unscaled\. Call zero_grad\(\)"):
            call()
    optimizer.zero_grad()
    optimizer.backward(sum(p.float().sum() for p in params))
    optimizer.step()
    assert all((p == -1 - 1).all() for p in params)
