"""A GradScaler and two optimizers, one of them fused, driven in any order beside a plain model.

All values are exact in float32: the model, in Python's floats, has to be met exactly.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import mpcore
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

READY, UNSCALED, STEPPED = range(3)
VALUES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5])
BAD = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}
#: parameter and what its gradient is instead
SPOILT = st.none() | st.tuples(st.integers(0, 1), st.sampled_from(sorted(BAD)))
LR = 0.25


@st.composite
def scales(draw: st.DrawFn) -> mpcore.DynamicLossScale:
    low, init, high = sorted(draw(st.tuples(*[st.integers(-3, 8)] * 3)))
    return mpcore.DynamicLossScale(
        init=2.0**init,
        growth_factor=2.0 ** draw(st.integers(1, 2)),
        backoff_factor=2.0 ** -draw(st.integers(1, 2)),
        growth_interval=draw(st.integers(1, 3)),
        min_scale=2.0**low,
        max_scale=2.0**high,
        hysteresis=draw(st.integers(1, 2)),
        refill=draw(st.sampled_from(["growth", "clean", "clean_or_backoff"])),
    )


class Machine(RuleBasedStateMachine):
    @initialize(scale=scales())
    def start(self, scale: mpcore.DynamicLossScale) -> None:
        self.rule = scale
        self.params = [nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([-2.0]))]
        self.optimizers = [
            torch.optim.SGD([param], lr=LR, fused=fused)
            for param, fused in zip(self.params, (False, True), strict=True)
        ]
        self.scaler = mpcore.GradScaler.of(scale, "cpu")
        self.weights = [1.0, -2.0]
        self.scale, self.clean, self.budget = scale.init, 0, scale.hysteresis
        self.steps = self.skipped = 0
        self.forget()

    def forget(self) -> None:
        self.grads: list[float | None] = [None, None]
        self.stages = [READY, READY]
        self.flags: list[bool] = []
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @property
    def fresh(self) -> bool:
        return self.stages == [READY, READY]

    @precondition(lambda self: self.fresh)
    @rule(values=st.tuples(VALUES, VALUES), spoilt=SPOILT)
    def backward(self, values: tuple[float, float], spoilt: tuple[int, str] | None) -> None:
        factors = list(values)
        if spoilt is not None:
            factors[spoilt[0]] = BAD[spoilt[1]]
        loss = sum((p * f).sum() for p, f in zip(self.params, factors, strict=True))
        self.scaler.scale(loss).backward()
        self.grads = [(old or 0.0) + f for old, f in zip(self.grads, factors, strict=True)]

    def ready(self, index: int) -> bool:
        return self.grads[index] is not None and self.stages[index] != STEPPED

    @rule(index=st.integers(0, 1))
    def unscale(self, index: int) -> None:
        if self.stages[index] != READY:
            with pytest.raises(RuntimeError, match="unscale_"):
                self.scaler.unscale_(self.optimizers[index])
        elif self.ready(index):
            self.scaler.unscale_(self.optimizers[index])
            self.stages[index] = UNSCALED
            self.flags.append(not math.isfinite(self.grads[index] or 0.0))
            if not self.flags[-1]:
                assert self.params[index].grad.item() == self.grads[index]

    @rule(index=st.integers(0, 1), factor=st.sampled_from([0.0, 0.5, 2.0]))
    def edit(self, index: int, factor: float) -> None:
        """What clipping does: gradients change between unscaling and the step."""
        grad = self.grads[index]
        if self.stages[index] == UNSCALED and grad is not None and math.isfinite(grad):
            self.params[index].grad.mul_(factor)
            self.grads[index] = grad * factor

    @rule(index=st.integers(0, 1))
    def step(self, index: int) -> None:
        optimizer, grad = self.optimizers[index], self.grads[index]
        if self.stages[index] == STEPPED:
            with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
                self.scaler.step(optimizer)
            return
        if grad is None:
            return
        self.scaler.step(optimizer)
        if self.stages[index] == READY:
            self.flags.append(not math.isfinite(grad))
        self.stages[index] = STEPPED
        result = self.scaler.last_step_of(optimizer)
        assert result.skipped == (not math.isfinite(grad))
        assert result.loss_scale == self.scale
        assert bool(result.overflowed()) == result.skipped
        if math.isfinite(grad):
            self.weights[index] -= LR * grad

    @rule()
    def update(self) -> None:
        if not self.flags:
            if self.steps + len(self.grads) and self.scaler._scale is not None:
                with pytest.raises(AssertionError, match="No inf checks were recorded"):
                    self.scaler.update()
            return
        self.scaler.update()
        self.steps += 1
        self.skipped += any(self.flags)
        self.move(any(self.flags))
        self.forget()

    def move(self, bad: bool) -> None:
        rule = self.rule
        if bad:
            self.clean, self.budget = 0, self.budget - 1
            if self.budget <= 0:
                self.scale = max(self.scale * rule.backoff_factor, rule.min_scale)
                if rule.refill == "clean_or_backoff":
                    self.budget = rule.hysteresis
            return
        self.clean += 1
        if rule.refill != "growth":
            self.budget = rule.hysteresis
        if self.clean == rule.growth_interval:
            self.scale = min(self.scale * rule.growth_factor, rule.max_scale)
            self.clean, self.budget = 0, rule.hysteresis

    @precondition(lambda self: self.fresh)
    @rule(way=st.sampled_from(["state_dict", "pickle", "deepcopy", "old"]))
    def save_and_go_on(self, way: str) -> None:
        if way == "pickle":
            self.scaler = pickle.loads(pickle.dumps(self.scaler))
        elif way == "deepcopy":
            self.scaler = copy.deepcopy(self.scaler)
        else:
            saved: Any = self.scaler.state_dict()
            if way == "state_dict":
                self.scaler = mpcore.GradScaler("cpu")
            self.scaler.load_state_dict(saved)
        self.forget()  # gradients of a loss that another scaler multiplied

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        if not hasattr(self, "weights"):
            return
        assert self.scaler.get_scale() == self.scale
        assert self.rule.min_scale <= self.scale <= self.rule.max_scale
        assert (self.scaler.steps, self.scaler.skipped_steps) == (self.steps, self.skipped)
        assert [param.item() for param in self.params] == self.weights


TestGradScaler = Machine.TestCase
TestGradScaler.settings = settings(stateful_step_count=40)
