"""Exceptions in what is not ours: the wrapped step, hooks, closures, a load."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot

GENERALS = [engine for engine in ENGINES if not engine.fused]
RULE = mpcore.DynamicLossScale(init=2.0**6, growth_interval=2)
HALF_A_STEP = r"expected whole masters.*Load a checkpoint"


class Stops(Exception):
    """What a hook, a closure or a step of somebody else raises."""


class Breaks(torch.optim.SGD):
    """Moves some parameters through `.data`, as many do, and fails."""

    fails = False

    def step(self, closure: Any = None) -> None:
        for number, param in enumerate(p for group in self.param_groups for p in group["params"]):
            if self.fails and number == 1:
                raise Stops
            param.data.add_(param.grad, alpha=-1.0)


def make(engine: Engine, build: Any = torch.optim.AdamW) -> tuple[list[nn.Parameter], Any]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    params = [nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for dtype in dtypes]
    return params, engine.wrap(build(params, lr=0.1), RULE)


def backward(params: list[nn.Parameter], optimizer: Any, size: float = 1.0) -> None:
    optimizer.backward(torch.stack([(p.float() * size).sum() for p in params]).sum())


def everything(optimizer: Any) -> Any:
    return snapshot(optimizer), optimizer.state_dict()["mpcore"]


def assert_half_a_step(optimizer: Any, params: list[nn.Parameter]) -> None:
    for refuses in (
        optimizer.step,
        optimizer.state_dict,
        optimizer.unscale_,
        lambda: optimizer.clip_grad_norm_(1.0),
        lambda: backward(params, optimizer),
        optimizer.accumulate,
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
        lambda: optimizer.step(lambda: None),
    ):
        with pytest.raises(mpcore.StageError, match=HALF_A_STEP):
            refuses()
        optimizer.zero_grad()


@pytest.mark.parametrize("engine", GENERALS, ids=str)
def test_a_wrapped_step_that_fails_half_way_is_not_gone_on_from(engine: Engine) -> None:
    params, optimizer = make(engine, Breaks)
    backward(params, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy((optimizer.state_dict(), params))
    before = everything(optimizer)
    optimizer.inner.fails = True
    backward(params, optimizer)
    with pytest.raises(Stops):
        optimizer.step()
    assert_half_a_step(optimizer, params)
    optimizer.load_state_dict(saved[0])
    with torch.no_grad():
        for param, value in zip(params, saved[1], strict=True):
            param.copy_(value)
    assert same_bits(everything(optimizer), before)
    optimizer.inner.fails = False
    backward(params, optimizer)
    optimizer.step()
    assert optimizer.steps == 2


@pytest.mark.parametrize("engine", GENERALS, ids=str)
def test_a_hook_before_the_wrapped_step_leaves_the_step_before(engine: Engine) -> None:
    params, optimizer = make(engine)
    others, other = make(engine)
    errors = [Stops, None, Stops, Stops, None, None]

    def hook(*_: Any) -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    optimizer.inner.register_step_pre_hook(hook)
    for size in (1.0, torch.inf, 2.0, 3.0):
        backward(others, other, size)
        other.step()
        other.zero_grad()
        backward(params, optimizer, size)
        for _ in range(3):
            try:
                optimizer.step()
                break
            except Stops:
                optimizer.state_dict()  # whole
        optimizer.zero_grad()
        assert same_bits(everything(optimizer), everything(other))


@pytest.mark.parametrize("engine", GENERALS, ids=str)
def test_a_hook_after_the_wrapped_step_leaves_half_a_step(engine: Engine) -> None:
    params, optimizer = make(engine)

    def hook(*_: Any) -> None:
        raise Stops

    optimizer.inner.register_step_post_hook(hook)
    backward(params, optimizer)
    with pytest.raises(Stops):
        optimizer.step()
    assert_half_a_step(optimizer, params)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_wrapper_come_before_and_after_whole_steps(engine: Engine, when: str) -> None:
    params, optimizer = make(engine)
    others, other = make(engine)
    for one, weights in ((optimizer, params), (other, others)):
        backward(weights, one)
    errors = [Stops]

    def hook(*_: Any) -> None:
        if errors:
            raise errors.pop()

    register = {"before": optimizer.register_step_pre_hook}
    register.get(when, optimizer.register_step_post_hook)(hook)
    with pytest.raises(Stops):
        optimizer.step()
    assert optimizer.steps == (when == "after")
    if when == "before":
        optimizer.step()
    other.step()
    assert same_bits(everything(optimizer), everything(other))


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.LBFGS])
@pytest.mark.parametrize("evaluation", [1, 2, 3])
@pytest.mark.parametrize("where", ["begin", "backward", "unscale_", "end"])
def test_a_closure_that_fails_undoes_the_step(
    engine: Engine, build: Any, evaluation: int, where: str
) -> None:
    if engine.fused and build is torch.optim.LBFGS:
        pytest.skip("has no fused step")
    if evaluation > 1 and build is torch.optim.AdamW:
        pytest.skip("evaluates once")
    params, optimizer = make(engine, build)
    left = evaluation

    def fail(here: str) -> None:
        if here == where and not left:
            raise Stops

    def closure() -> Any:
        nonlocal left
        left -= 1
        fail("begin")
        optimizer.zero_grad()
        loss = torch.stack([(p.float() - 0.3).square().sum() for p in params]).sum()
        optimizer.backward(loss)
        fail("backward")
        optimizer.unscale_()
        fail("unscale_")
        for param in params:
            param.grad.mul_(0.5)
        fail("end")
        return loss

    others, other = make(engine, build)
    before = everything(optimizer)
    with pytest.raises(Stops):
        optimizer.step(closure)
    optimizer.zero_grad()
    after = everything(optimizer)
    assert same_bits(after[0]["weights"], before[0]["weights"])
    assert same_bits(after[1], before[1])
    assert [p.grad_dtype for p in params] == [p.dtype for p in params]
    left = 100
    optimizer.step(closure)
    params, first, optimizer = others, optimizer, other
    left = 100
    optimizer.step(closure)
    assert same_bits(everything(first)[0]["weights"], everything(other)[0]["weights"])


def test_a_load_that_is_interrupted_is_not_gone_on_from(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = make(engine)
    backward(params, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    saved, before = copy.deepcopy(optimizer.state_dict()), everything(optimizer)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for where in ("mpcore.masters.Masters.replace_state", "mpcore.loss_scale.losses.Losses.resume"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises(KeyboardInterrupt):
                optimizer.load_state_dict(saved)
        assert_half_a_step(optimizer, params)
        optimizer.load_state_dict(saved)
        assert same_bits(everything(optimizer), before)


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_of_a_load_come_before_and_after_it(engine: Engine, when: str) -> None:
    params, optimizer = make(engine)
    saved = copy.deepcopy(optimizer.state_dict())
    backward(params, optimizer)
    optimizer.step()
    optimizer.zero_grad()

    def hook(*_: Any) -> None:
        raise Stops

    getattr(optimizer, f"register_load_state_dict_{when}_hook")(hook)
    with pytest.raises(Stops):
        optimizer.load_state_dict(saved)
    assert optimizer.steps == (when == "pre")
    optimizer.state_dict()


def test_a_pass_that_is_added_up_in_part_is_not_gone_on_from(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcore.engine.accumulation._AT_ONCE", 1)  # each parameter is a slice
    params = [nn.Parameter(torch.zeros(3).half()) for _ in range(2)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=1.0), mpcore.StaticLossScale(2.0))

    def fails(some: list[Tensor]) -> None:
        if some[0] is params[1]:
            raise MemoryError

    def accumulate() -> None:
        optimizer.backward(torch.stack([p.float().sum() for p in params]).sum())
        optimizer.accumulate()

    accumulate()
    sums: Any = optimizer._stage._sums._sums
    unscaled = sums._unscaled
    monkeypatch.setattr(sums, "_unscaled", lambda some, *rest: fails(some) or unscaled(some, *rest))
    with pytest.raises(MemoryError):
        accumulate()
    for call in (optimizer.step, optimizer.accumulate, optimizer.state_dict):
        with pytest.raises(mpcore.StageError, match="left half unscaled"):
            call()
    optimizer.zero_grad()
    accumulate()
    optimizer.step()
    assert all((p == -1).all() for p in params)
