"""A MixedPrecisionOptimizer driven in any order, beside a plain model of it in Python's floats.

Values are chosen so that all sums and products are exact in float32 unless a clip divides: then the
model is within a bound. After each rule invariants 1, 2, 5, 6, 7 and 8 of the design hold.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import mpcore
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mpcore.errors import StageError
from mpcore.stores import split

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
VALUES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5])
GRADIENTS = st.lists(st.none() | st.lists(VALUES, min_size=2, max_size=2), min_size=3, max_size=3)
BAD = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}
#: parameter, place and what is there instead
SPOILT = st.none() | st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from(sorted(BAD)))
LR, MOMENTUM, DECAY = 0.25, 0.5, 0.125
INITIAL = [[1.0, -2.0], [0.5, 3.0], [4.0, -0.25]]


class Model:
    """What should happen, in Python's floats: SGD with momentum and weight decay over a scale."""

    def __init__(self, scale: mpcore.DynamicLossScale) -> None:
        self.rule = scale
        self.weights = [list(weight) for weight in INITIAL]
        self.velocity: list[list[float] | None] = [None] * len(INITIAL)
        self.scale, self.clean, self.budget = scale.init, 0, scale.hysteresis
        self.steps = self.skipped = 0
        self.forget()

    def forget(self) -> None:
        self.grads: list[list[float] | None] = [None] * len(INITIAL)
        self.clip = 1.0

    def add(self, index: int, values: list[float]) -> None:
        old = self.grads[index] or [0.0, 0.0]
        self.grads[index] = [a + b for a, b in zip(old, values, strict=True)]

    @property
    def flat(self) -> list[float]:
        return [g for grad in self.grads if grad is not None for g in grad]

    @property
    def overflow(self) -> bool:
        return not all(map(math.isfinite, self.flat))

    def norm(self) -> float:
        return math.sqrt(sum(g * g for g in self.flat))

    def clip_to(self, max_norm: float) -> None:
        if not self.overflow:
            self.clip = min(self.clip, max_norm / (self.norm() + 1e-6))

    def step(self) -> None:
        self.steps += 1
        self.move(self.overflow)
        if self.overflow:
            self.skipped += 1
        else:
            for index, grad in enumerate(self.grads):
                if grad is not None:
                    self.update(index, [g * self.clip for g in grad])
        self.clip = 1.0

    def throw_away(self) -> None:
        """A step that was looked at and that nobody took: a skipped one, or none."""
        if self.overflow:
            self.steps, self.skipped = self.steps + 1, self.skipped + 1
            self.move(True)

    def update(self, index: int, grad: list[float]) -> None:
        weight, old = self.weights[index], self.velocity[index]
        decayed = [g + DECAY * w for g, w in zip(grad, weight, strict=True)]
        new = decayed
        if old is not None:
            new = [MOMENTUM * v + g for v, g in zip(old, decayed, strict=True)]
        self.velocity[index] = new
        self.weights[index] = [w - LR * v for w, v in zip(weight, new, strict=True)]

    def move(self, overflow: bool) -> None:
        if overflow:
            self.clean, self.budget = 0, max(self.budget - 1, 0)
            if self.budget == 0:
                self.scale = max(self.scale / 2, self.rule.min_scale)
            return
        self.clean += 1
        if self.clean == self.rule.growth_interval:
            self.clean, self.budget = 0, self.rule.hysteresis
            self.scale = min(self.scale * 2, self.rule.max_scale)


class Machine(RuleBasedStateMachine):
    engine: Engine
    masters: Literal["float32", "split"] = "float32"

    @initialize(
        init=st.integers(0, 6),
        interval=st.integers(1, 3),
        hysteresis=st.integers(1, 2),
    )
    def begin(self, init: int, interval: int, hysteresis: int) -> None:
        self.rule_of_scale = mpcore.DynamicLossScale(
            2.0**init,
            growth_interval=interval,
            hysteresis=hysteresis,
            min_scale=1.0,
            max_scale=2.0**7,
        )
        self.model = Model(self.rule_of_scale)
        self.params = [
            torch.nn.Parameter(torch.tensor(weight).to(dtype))
            for weight, dtype in zip(INITIAL, DTYPES, strict=True)
        ]
        self.optimizer = self.wrap(self.params)
        self.begin_anew()
        self.exact = True  # until a clip divides

    def wrap(self, params: list[torch.nn.Parameter]) -> Any:
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        inner = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        return self.engine.wrap(inner, self.rule_of_scale, masters=self.masters)

    @precondition(lambda self: not self.collected)
    @rule(values=GRADIENTS, bad=SPOILT)
    def backward(self, values: list[Any], bad: Any) -> None:
        """A micro-batch: some parameters take part, one of them may be spoilt."""
        if bad is not None:
            index, place, kind = bad
            values = [list(v) if v is not None else None for v in values]
            values[index] = values[index] or [1.0, 1.0]
            values[index][place] = BAD[kind]
        terms = []
        for index, (param, value) in enumerate(zip(self.params, values, strict=True)):
            if value is not None:
                # the gradient itself, whatever the weight holds
                terms.append((param.float() * torch.tensor(value)).sum())
                self.model.add(index, value)
        if terms:
            self.optimizer.backward(torch.stack(terms).sum())
            self.scaled = True

    @precondition(lambda self: self.scaled)
    @rule()
    def accumulate(self) -> None:
        """Moves gradients into float32 sums, which changes nothing but where they are."""
        if self.collected:
            with pytest.raises(StageError, match="expected to be called before unscale_"):
                self.optimizer.accumulate()
            return
        self.optimizer.accumulate()
        assert [param.grad for param in self.params] == [None] * 3

    @precondition(lambda self: self.scaled)
    @rule()
    def unscale(self) -> None:
        if self.unscaled:
            with pytest.raises(StageError, match="expected one call per step"):
                self.optimizer.unscale_()
            return
        self.optimizer.unscale_()
        self.collected = self.unscaled = True
        for grad, expected in zip(self.optimizer.grads(), self.expected_grads(), strict=True):
            assert torch.equal(grad.isfinite(), torch.tensor(expected).isfinite())
            if not self.model.overflow and self.exact:
                assert grad.tolist() == pytest.approx(expected, rel=1e-6)

    def expected_grads(self) -> list[list[float]]:
        return [
            [g * self.model.clip for g in grad] for grad in self.model.grads if grad is not None
        ]

    @precondition(lambda self: self.scaled)
    @rule(max_norm=st.sampled_from([0.5, 1.0, 1e6]))
    def clip(self, max_norm: float) -> None:
        clipped_before = self.model.clip != 1.0
        norm = float(self.optimizer.clip_grad_norm_(max_norm))
        self.collected = True
        if self.model.overflow:
            assert not math.isfinite(norm)
        elif not clipped_before:
            assert norm == pytest.approx(self.model.norm(), rel=1e-6, abs=1e-12)
        before = self.model.clip
        self.model.clip_to(max_norm)
        self.exact = self.exact and self.model.clip == before == 1.0

    @precondition(lambda self: self.scaled)
    @rule()
    def step(self) -> None:
        scale, overflow = self.model.scale, self.model.overflow
        before = snapshot(self.optimizer)
        self.optimizer.step()
        self.model.step()
        result = self.optimizer.last_step
        assert result.skipped == overflow  # invariants 6 and 7
        assert result.loss_scale == scale  # invariant 2
        if overflow:  # invariant 1; masters and state may have been made by the step
            after = snapshot(self.optimizer)
            assert same_bits(after["weights"], before["weights"])
            for index, param in enumerate(self.params):
                held = self.optimizer.state.get(param, {}).get("momentum_buffer")
                assert self.model.velocity[index] is not None or held is None or not held.any()
        self.optimizer.zero_grad()
        self.begin_anew()

    def begin_anew(self) -> None:
        self.model.forget()
        self.collected = self.unscaled = self.scaled = False

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        if self.collected:
            self.model.throw_away()
        self.begin_anew()
        if not set_to_none:  # zeros that are there take part in the next step
            for index, param in enumerate(self.params):
                if param.grad is not None:
                    self.model.add(index, [0.0, 0.0])

    @precondition(lambda self: not self.model.flat)
    @rule()
    def save_and_load(self) -> None:
        saved = self.optimizer.state_dict()
        params = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
        fresh = self.wrap(params)
        fresh.load_state_dict(saved)
        assert same_bits(fresh.state_dict(), saved)  # invariant 8
        self.params, self.optimizer = params, fresh

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        scale = self.optimizer.loss_scale
        assert scale == self.model.scale
        assert math.frexp(scale)[0] == 0.5  # invariant 5
        assert (self.optimizer.steps, self.optimizer.skipped_steps) == (
            self.model.steps,
            self.model.skipped,
        )
        for param, expected in zip(self.params, self.model.weights, strict=True):
            master = self.optimizer.float32_state(param).get("master", param).detach()
            if self.exact:
                assert master.tolist() == pytest.approx(expected, rel=2.0**-20, abs=2.0**-22)
            else:
                assert master.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            rounded = master.to(param.dtype)
            if self.masters == "split" and master.dtype != param.dtype:
                rounded = split(master, param.dtype)[0]  # ties of bfloat16 go away from zero
            assert torch.equal(param.detach(), rounded)


def machine_of(engine: Engine, masters: str = "float32") -> Any:
    own = {"engine": engine, "masters": masters}
    case = type(f"MachineOf{engine}-{masters}", (Machine,), own).TestCase
    case.settings = settings(stateful_step_count=25)
    return case


TestReferenceGeneral, TestReferenceFused = map(machine_of, ENGINES[:2])
TestCpuGeneral, TestCpuFused = map(machine_of, ENGINES[2:4])
TestCompiledGeneral, TestCompiledFused = map(machine_of, ENGINES[4:])
TestSplitGeneral = machine_of(ENGINES[0], "split")
TestSplitReferenceFused, TestSplitFused = (machine_of(ENGINES[i], "split") for i in (1, 5))
