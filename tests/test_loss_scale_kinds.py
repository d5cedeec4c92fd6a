"""A loss scale of somebody's own: whoever asks a loss scale asks methods, not its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mpcore
import pytest
import torch
from mpcore.loss_scale import LossScaleState, LossScaleTensors, count_step_, next_state
from torch import Tensor, nn

from mpcore_testing.engines import ENGINES, Engine


@dataclass(frozen=True)
class Climbing(mpcore.LossScale):
    """Doubles after each clean step, and starts again at 2 after an overflow."""

    top: float = 64.0

    def first(self) -> LossScaleState:
        return LossScaleState(2.0, 0, 0, 0, 0)

    def resumed(self, saved: LossScaleState) -> LossScaleState:
        return saved._replace(scale=min(saved.scale, self.top))

    def after(self, state: LossScaleState, *, found_inf: bool, largest: float) -> LossScaleState:
        return state._replace(scale=2.0 if found_inf else min(state.scale * 2, self.top))

    def advance_(
        self,
        tensors: LossScaleTensors,
        found_inf: Tensor,
        update: Any = None,
        largest: Tensor | None = None,
    ) -> None:
        higher = (tensors.scale * 2).clamp(max=self.top)
        tensors.scale.copy_(torch.where(found_inf != 0, torch.full_like(higher, 2.0), higher))
        count_step_(tensors.counters, found_inf)


def trained(optimizer: Any, weight: Tensor, steps: int, bad: tuple[int, ...]) -> list[float]:
    """The scale after each step."""
    scales = []
    for step in range(steps):
        optimizer.backward((weight.float() * (torch.inf if step in bad else 1.0)).sum())
        optimizer.step()
        optimizer.zero_grad()
        scales.append(optimizer.loss_scale)
    return scales


def expected(scaling: mpcore.LossScale, steps: int, bad: tuple[int, ...]) -> list[float]:
    state, scales = scaling.first(), []
    for step in range(steps):
        state = next_state(scaling, state, found_inf=step in bad)
        scales.append(state.scale)
    return scales


def begun(engine: Engine, scaling: mpcore.LossScale) -> tuple[Any, Tensor]:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    return engine.wrap(torch.optim.SGD([weight], lr=2.0**-6), scaling), weight


def test_an_optimizer_follows_it_and_resumes(engine: Engine) -> None:
    optimizer, weight = begun(engine, Climbing())
    assert trained(optimizer, weight, 9, bad=(2, 3)) == expected(Climbing(), 9, (2, 3))
    assert (optimizer.steps, optimizer.skipped_steps) == (9, 2)
    again, other = begun(engine, Climbing(top=8.0))
    again.load_state_dict(optimizer.state_dict())
    assert (again.loss_scale, again.steps) == (8.0, 9)
    with torch.no_grad():
        other.copy_(weight)
    assert trained(again, other, 1, bad=()) == [8.0]


def test_a_loss_of_its_own_and_a_monitor_follow_it() -> None:
    optimizer, weight = begun(ENGINES[0], mpcore.NoLossScale())
    own = optimizer.add_loss("own", Climbing())
    monitor, reported = mpcore.Monitor(optimizer), []
    for bad in (False, True, False):
        own.backward((weight.float() * (torch.inf if bad else 1.0)).sum())
        optimizer.step()
        reported += [monitor.report()]
        optimizer.zero_grad()
    assert own.loss_scale == expected(Climbing(), 3, (1,))[-1]
    assert [report.step if report else None for report in reported] == [None, 1, None]


def test_a_grad_scaler_follows_it() -> None:
    scaler = mpcore.GradScaler.of(Climbing(), "cpu")
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=2.0**-6)
    scales = []
    for step in range(5):
        scaler.scale((weight * (torch.inf if step == 2 else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == expected(Climbing(), 5, (2,))


def test_what_is_none_is_refused_and_a_half_of_one_cannot_be_made() -> None:
    with pytest.raises(mpcore.ArgumentTypeError, match="expected DynamicLossScale"):
        begun(ENGINES[0], 1024.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (mpcore.LossScale,), {"first": Climbing.first})()
