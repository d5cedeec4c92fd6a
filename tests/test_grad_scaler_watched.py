"""A skip that is seen by whoever has replaced `optimizer.step` to see whether it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mpcore_testing.syncs import ScalarReads

INF = float("inf")
FACTORS = (1.0, INF, 0.5, INF, INF, 2.0)
TAKEN = [factor != INF for factor in FACTORS]


def adamw(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=0.1, **options)


def wrapped(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: mpcore.MixedPrecisionOptimizer(adamw(**options)(params))


KINDS: dict[str, tuple[Any, torch.dtype]] = {
    "plain": (adamw(), torch.float32),
    "fused": (adamw(fused=True), torch.float32),
    "wrapped": (wrapped(), torch.float16),
    "wrapped fused": (wrapped(fused=True), torch.float16),
    "wrapped bfloat16": (wrapped(), torch.bfloat16),
    "wrapped float32": (wrapped(), torch.float32),
}


class Watch:
    """What Accelerate does around each step: another function, and what was there afterwards."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.original = optimizer, optimizer.step
        self.called: list[bool] = []

    def step(self, scaler: Any) -> None:
        self.called.append(False)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.called[-1] = True
            return self.original(*args, **kwargs)

        self.optimizer.step = noted
        scaler.step(self.optimizer, None)
        scaler.update()
        self.optimizer.step = self.original


def build(name: str) -> tuple[nn.Parameter, Any, Any]:
    make, dtype = KINDS[name]
    param = nn.Parameter(torch.linspace(-1, 2, 6).to(dtype))
    return param, make([param]), mpcore.GradScaler("cpu", init_scale=256.0, growth_interval=2)


def backward(scaler: Any, optimizer: Any, param: Tensor, factor: float) -> None:
    optimizer.zero_grad()
    scaler.scale((param.float().square() * factor).sum()).backward()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_replaced_step_is_called_where_the_optimizer_steps_and_nowhere_else(
    name: str, unscale: bool, scheduled: bool
) -> None:
    courses = []
    for watched in (True, False):
        param, optimizer, scaler = build(name)
        if scheduled:
            LambdaLR(optimizer, lambda _: 1.0)  # which replaces `step` as well
        watch = Watch(optimizer)
        for factor in FACTORS:
            backward(scaler, optimizer, param, factor)
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_([param], 0.5)
            if watched:
                watch.step(scaler)
            else:
                scaler.step(optimizer)
                scaler.update()
        assert watch.called == (TAKEN if watched else [])
        assert scaler.last_step_of(optimizer).skipped is False
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
        if isinstance(optimizer, mpcore.MixedPrecisionOptimizer):
            assert (optimizer.steps, optimizer.skipped_steps) == (6, 3)
        state = optimizer.state[param]
        values = [param.detach(), state["exp_avg"], state.get("master", param.detach())]
        courses.append((scaler.get_scale(), scaler.skipped_steps, float(state["step"]), values))
    assert courses[0][:3] == courses[1][:3]
    for watched_value, other in zip(courses[0][3], courses[1][3], strict=True):
        assert torch.equal(watched_value, other)


@pytest.mark.parametrize("name", [name for name in KINDS if "fused" in name])
def test_only_a_step_that_somebody_else_has_replaced_syncs(name: str) -> None:
    reads = []
    for replace in ("nobody", "scheduler", "put back", "watch"):
        param, optimizer, scaler = build(name)
        watch = Watch(optimizer)
        if replace == "scheduler":
            LambdaLR(optimizer, lambda _: 1.0)
        for _ in range(2):
            backward(scaler, optimizer, param, 1.0)
            with ScalarReads() as counted:
                if replace == "watch":
                    watch.step(scaler)
                else:
                    scaler.step(optimizer)
                    scaler.update()
            if replace == "put back":
                optimizer.step = watch.original
        reads.append(counted.count)
    assert reads[:3] == [reads[0]] * 3
    assert reads[3] == reads[0] + 1


def test_a_watch_that_copies_the_mark_of_a_scheduler_is_seen_all_the_same() -> None:
    param, optimizer, scaler = build("wrapped")
    LambdaLR(optimizer, lambda _: 1.0)
    called = []
    inner = optimizer.step

    @functools.wraps(inner)
    def noted(*args: Any, **kwargs: Any) -> Any:
        called.append(args)
        return inner(*args, **kwargs)

    optimizer.step = noted
    assert optimizer.step._wrapped_by_lr_sched
    for factor in FACTORS:
        backward(scaler, optimizer, param, factor)
        scaler.step(optimizer)
        scaler.update()
    assert len(called) == sum(TAKEN)


@pytest.mark.parametrize("name", ["fused", "wrapped"])
def test_a_watched_step_refuses_what_torch_refuses_and_hands_its_scale_on(name: str) -> None:
    param, optimizer, scaler = build(name)
    inner = optimizer.step
    seen = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append((optimizer.grad_scale.item(), optimizer.found_inf.item()))
        return inner(*args, **kwargs)

    optimizer.step = noted
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    backward(scaler, optimizer, param, 1.0)
    with pytest.raises(RuntimeError, match="Closure use"):
        scaler.step(optimizer, closure=lambda: None)
    param.grad.mul_(2)
    optimizer.grad_scale = torch.tensor(2.0)  # torch multiplies what somebody has left there
    scaler.step(optimizer)
    assert seen == [(512.0, 0.0)]
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    other, twin, plain = build(name)
    backward(plain, twin, other, 1.0)
    plain.step(twin)
    assert torch.equal(param, other)


def test_a_watched_step_that_fails_leaves_nothing_behind() -> None:
    param, optimizer, scaler = build("fused")

    def fails() -> None:
        raise KeyError("disk full")

    optimizer.step = fails
    backward(scaler, optimizer, param, 1.0)
    with pytest.raises(KeyError, match="disk full"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


def test_an_optimizer_of_the_old_kind_is_still_handed_the_scaler() -> None:
    given = []

    class Old(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
            given.append(grad_scaler)

    param = nn.Parameter(torch.ones(2))
    optimizer, scaler = Old([param]), mpcore.GradScaler("cpu")
    inner = optimizer.step
    optimizer.step = functools.wraps(inner)(lambda **kwargs: inner(**kwargs))
    scaler.scale(param.sum()).backward()
    with pytest.warns(FutureWarning, match="stop passing itself"):
        scaler.step(optimizer)
    assert given == [scaler]


def test_a_watched_optimizer_without_a_gradient_steps() -> None:
    param, optimizer, scaler = build("wrapped")
    scaler.scale(torch.ones(1))
    watch = Watch(optimizer)
    backward(scaler, torch.optim.SGD([param], lr=1.0), param, 1.0)
    param.grad = None
    optimizer.step = lambda *_: watch.called.append(True)
    scaler.step(optimizer)
    assert watch.called == [True]
