"""Optimizers that evaluate closures, once or often; overflows and errors in the middle."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.closures import INNERS, SCALE, closure_of, contents, loss_of, make, patterns
from mpcore_testing.engines import GENERAL, Engine, engine_cases


def reference_step(
    params: list[nn.Parameter], copies: list[nn.Parameter], optimizer: Any, scale: float
) -> Any:
    """The same step of a plain optimizer over float32 copies, by hand."""

    def closure() -> Tensor:
        with torch.no_grad():
            for param, twin in zip(params, copies, strict=True):
                param.copy_(twin)
                param.grad = None
        loss = loss_of(params)
        (loss * scale).backward()
        for param, twin in zip(params, copies, strict=True):
            twin.grad = param.grad.float() / scale
        return loss

    return optimizer.step(closure)


@pytest.mark.parametrize("name", INNERS)
def test_steps_with_a_closure_equal_a_plain_optimizer_on_float32_copies(name: str) -> None:
    params, optimizer = make(GENERAL, name)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    copies = [nn.Parameter(p.detach().float().clone()) for p in params]
    reference = INNERS[name](copies)
    for step in range(7):
        calls: list[float] = []
        expected = reference_step(others, copies, reference, optimizer.loss_scale)
        returned = optimizer.step(closure_of(optimizer, params, calls=calls))
        assert returned.item() == expected.item() == calls[0]
        for param, twin in zip(params, copies, strict=True):
            master = optimizer.state[param].get("master", param)
            assert patterns(master) == patterns(twin), step
            assert patterns(param) == patterns(twin.to(param.dtype))
    assert (optimizer.steps, optimizer.skipped_steps) == (7, 0)
    assert optimizer.loss_scale == 2.0**9
    assert ("LBFGS" in name) == (len(calls) > 1)


@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_a_closure_that_clips_equals_clipping_between_backward_and_step(
    engine: Engine, name: str
) -> None:
    params, optimizer = make(engine, name)
    inner = closure_of(optimizer, params)

    def closure() -> Tensor:
        loss = inner()
        optimizer.clip_grad_norm_(0.5)
        return loss

    if "LBFGS" in name:  # evaluates anew, so there is no step without a closure to compare with
        optimizer.step(closure)
        assert optimizer.last_step.grad_norm > 0.5
        return
    others, other = make(engine, name)
    for _ in range(4):
        optimizer.step(closure)
        closure_of(other, others)()
        other.clip_grad_norm_(0.5)
        other.step()
        assert contents(params, optimizer)[:3] == contents(others, other)[:3]
        assert optimizer.last_step.grad_norm == other.last_step.grad_norm > 0.5


def test_a_closure_may_unscale_and_edit_gradients() -> None:
    params, optimizer = make(GENERAL, "LBFGS")
    inner = closure_of(optimizer, params)

    def closure() -> Tensor:
        loss = inner()
        optimizer.unscale_()
        for grad in optimizer.grads():
            grad.zero_()
        return loss

    before = contents(params, optimizer)[:2]
    optimizer.step(closure)
    assert contents(params, optimizer)[:2] == before
    assert optimizer.last_step.skipped is False


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("name", "engine", "evaluation"),
    [
        *((*case.values, 1) for case in engine_cases(INNERS)),
        *(("LBFGS", GENERAL, k) for k in (2, 3, 4)),
        ("LBFGS wolfe", GENERAL, 3),
    ],
    ids=str,
)
def test_an_overflow_in_any_evaluation_undoes_the_step_and_counts_once(
    engine: Engine, name: str, evaluation: int, warm: bool
) -> None:
    params, optimizer = make(engine, name)
    others, other = make(engine, name)
    for _ in range(2 if warm else 0):
        optimizer.step(closure_of(optimizer, params))
        other.step(closure_of(other, others))
    before, scale = contents(params, optimizer), optimizer.loss_scale
    calls: list[float] = []
    bad = closure_of(optimizer, params, lambda k: torch.inf if k == evaluation else 1.0, calls)
    returned = optimizer.step(bad)
    assert len(calls) == evaluation, "evaluated again after the overflow"
    assert returned.item() == calls[-1]
    after = contents(params, optimizer)
    if engine.fused and not warm:  # makes state before it knows: of zeros
        assert not any(any(raw) for state in after[2] for _, raw in state.values())
        before = *before[:2], after[2], before[3]
    assert after == before
    assert optimizer.last_step.skipped
    assert optimizer.last_step.loss_scale == scale
    assert len(optimizer.last_step.overflowed()) == 3
    assert (optimizer.loss_scale, optimizer.skipped_steps) == (scale / 2, 1)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, params))
        other.step(closure_of(other, others))
    assert contents(params, optimizer)[:3] == contents(others, other)[:3]


@pytest.mark.parametrize("value", [None, 3.5, "loss"])
def test_step_returns_what_the_closure_returns(engine: Engine, value: Any) -> None:
    params, optimizer = make(engine)
    inner = closure_of(optimizer, params)
    assert optimizer.step(lambda: (inner(), value)[1]) == value


class WithoutGradients(torch.optim.SGD):
    """An optimizer that evaluates the closure as it is, under `no_grad`."""

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        loss = closure()
        super().step()
        return loss


def test_a_closure_runs_with_gradients_enabled_whoever_calls_it() -> None:
    params = [nn.Parameter(torch.ones(6).half())]
    optimizer = GENERAL.wrap(WithoutGradients(params, lr=0.25), SCALE)
    with torch.no_grad():
        optimizer.step(closure_of(optimizer, params))
    assert optimizer.steps == 1
    assert not optimizer.last_step.skipped
    assert not torch.equal(params[0], torch.ones(6).half())


class Twice(torch.optim.SGD):
    """An optimizer that updates by the second of two evaluations."""

    def step(self, closure: Any) -> Any:
        with torch.enable_grad():
            closure()
            loss = closure()
        super().step()
        return loss


def test_a_weight_without_gradient_in_the_last_evaluation_is_not_moved_by_an_earlier_one() -> None:
    params = [nn.Parameter(torch.ones(6).half()) for _ in range(2)]
    optimizer = GENERAL.wrap(Twice(params, lr=0.25), SCALE)
    used = [params, params[:1]]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([param.float().sum() for param in used.pop(0)]).sum()
        optimizer.backward(loss)
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert [param.tolist() for param in params] == [[0.75] * 6, [1.0] * 6]


def test_a_closure_sees_the_models_parameters_in_the_groups() -> None:
    params, optimizer = make(GENERAL, "LBFGS")
    inner = closure_of(optimizer, params)
    seen: list[bool] = []

    def closure() -> Tensor:
        held = [*optimizer.param_groups[0]["params"], *optimizer.inner.param_groups[0]["params"]]
        seen.append(all(a is b for a, b in zip(held, [*params, *params], strict=True)))
        return inner()

    optimizer.step(closure)
    assert len(seen) > 1
    assert all(seen)


def test_float32_without_a_scale_is_plain_lbfgs_bit_for_bit() -> None:
    params = [nn.Parameter(torch.linspace(0, 1, 6))]
    copies = [nn.Parameter(torch.linspace(0, 1, 6))]
    optimizer = GENERAL.wrap(INNERS["LBFGS wolfe"](params), mpcore.NoLossScale())
    reference = INNERS["LBFGS wolfe"](copies)

    def plain() -> Tensor:
        reference.zero_grad()
        loss = loss_of(copies)
        loss.backward()
        return loss

    for _ in range(4):
        assert optimizer.step(closure_of(optimizer, params)).item() == reference.step(plain).item()
        assert patterns(params[0]) == patterns(copies[0])
