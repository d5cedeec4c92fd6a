"""A Monitor where somebody else drives: scalers tell it of losses, trainers wrap its optimizer."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import ArgumentTypeError
from torch import nn

from mpcore_testing.engines import Engine

SCALE = 2.0**4


class Run:
    """Six steps over losses of which some are not finite; one is unscaled and clipped."""

    def __init__(self, engine: Engine, *, own: bool) -> None:
        self.weight = nn.Parameter((torch.arange(6.0) / 4).half())
        scale = mpcore.DynamicLossScale(SCALE, growth_interval=2) if own else mpcore.NoLossScale()
        self.optimizer = engine.wrap(torch.optim.SGD([("w", self.weight)], lr=0.1), scale)
        self.scaler = mpcore.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
        self.records: list[Any] = []
        self.monitor = mpcore.Monitor(self.optimizer, every=2, sinks=[self.records.append])
        for step, factor in enumerate([1.0, torch.inf, 2.0, torch.nan, 1.0, 3.0]):
            for part in range(2):
                loss = (self.weight.float() * (part + 1)).square().mean() * factor
                self.backward(loss, own=own)
            self.step(own=own, clips=step == 4)

    def backward(self, loss: Any, *, own: bool) -> None:
        if own:
            self.optimizer.backward(loss)
        else:
            self.scaler.scale(loss).backward()
        loss.detach().zero_()  # as a loop that adds losses up in place

    def step(self, *, own: bool, clips: bool) -> None:
        if clips:
            (self.optimizer.unscale_ if own else lambda: self.scaler.unscale_(self.optimizer))()
            nn.utils.clip_grad_norm_([self.weight], 0.1)
        if own:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()


def test_losses_and_verdicts_are_those_of_an_optimizer_that_scales_itself(engine: Engine) -> None:
    own, driven = Run(engine, own=True), Run(engine, own=False)
    courses = [str(replace(run.monitor.course(), seconds=())) for run in (own, driven)]
    assert courses[0] == courses[1]  # NaN is not equal to itself
    assert own.monitor.course().loss[0] == pytest.approx(5 * 55 / 96)  # of w^2 and of (2 w)^2
    assert None not in own.monitor.course().loss
    kinds = [(type(record).__name__, getattr(record, "step", None)) for record in own.records]
    assert kinds == [(type(r).__name__, getattr(r, "step", None)) for r in driven.records]
    verdicts = [
        [
            (r.verdict.name, str(r.losses))
            for r in run.records
            if isinstance(r, mpcore.OverflowReport)
        ]
        for run in (own, driven)
    ]
    assert verdicts[0] == verdicts[1]
    assert len(verdicts[0]) == 2
    assert all(name != "search" for name, _ in verdicts[0])


def test_each_optimizer_of_one_scaler_hears_of_the_loss_once(engine: Engine) -> None:
    weights = [nn.Parameter(torch.ones(3).half()) for _ in range(2)]
    optimizers = [
        engine.wrap(torch.optim.SGD([weight], lr=0.1), mpcore.NoLossScale()) for weight in weights
    ]
    monitors = [mpcore.Monitor(optimizer, every=1) for optimizer in optimizers]
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE)
    for value in (2.0, 3.0):
        loss = sum((weight.float().sum() * value / 6 for weight in weights), torch.zeros(()))
        expected = loss.item()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.clip_grad_norm_(optimizers, 1.0)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        for monitor in monitors:
            assert monitor.reading is not None
            assert (monitor.reading.loss, monitor.reading.passes) == (pytest.approx(expected), 1)
    assert pickle.loads(pickle.dumps(scaler)).get_scale() == SCALE


def test_a_scaler_that_is_off_keeps_no_losses() -> None:
    scaler = mpcore.GradScaler("cpu", enabled=False)
    for _ in range(3):
        scaler.scale(torch.ones(()))
    assert scaler._losses._losses == []


def wrapped(depth: int, inner: object) -> Any:
    for _ in range(depth):
        inner = SimpleNamespace(optimizer=inner)
    return inner


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_a_trainer_has_wrapped_is_watched_and_asked(engine: Engine, depth: int) -> None:
    weight = nn.Parameter(torch.ones(2).half())
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=0.1), mpcore.StaticLossScale(2.0))
    monitor = mpcore.Monitor(wrapped(depth, optimizer), every=1)
    optimizer.backward(weight.float().sum())
    optimizer.step()
    assert monitor.reading is not None
    assert monitor.reading.loss == 2.0
    monitor.close()


@pytest.mark.parametrize("other", [None, torch.optim.SGD([torch.ones(2)]), wrapped(2, object())])
def test_what_holds_no_optimizer_of_ours_is_refused(other: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="a trainer's object around one, got"):
        mpcore.Monitor(other)


def test_a_schedule_waits_for_the_optimizer_itself(engine: Engine) -> None:
    weight = nn.Parameter(torch.ones(2).half())
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1.0), mpcore.StaticLossScale(2.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not mpcore.step_scheduler(scheduler, optimizer)  # before any step
    for factor in (torch.inf, 1.0):
        optimizer.backward((weight.float() * factor).sum())
        optimizer.step()
        optimizer.zero_grad()
        assert mpcore.step_scheduler(scheduler, optimizer) is (factor == 1.0)
    with pytest.raises(ArgumentTypeError, match="got SGD"):
        mpcore.step_scheduler(scheduler, optimizer.inner)
