"""Faults put into training: each gets its verdict and its name; clean runs get none."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine
from mpcore_testing.faulty import Model, batch, loss_of

SCALE = mpcore.DynamicLossScale(2.0**10, growth_interval=30)


def make(engine: Engine, scale: Any = SCALE) -> tuple[Model, Any, mpcore.Monitor]:
    model = Model().half()
    model.norm.float()
    optimizer = engine.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), scale)
    return model, optimizer, mpcore.Monitor(optimizer, model, every=10)


def train(model: Model, optimizer: Any, seeds: Any, edit: Any = None, factor: float = 1.0) -> None:
    for seed in seeds:
        x = batch(seed)
        if edit is not None:
            edit(x)
        optimizer.backward(loss_of(model(x)) * factor)
        optimizer.step()
        optimizer.zero_grad()


def nan_weight(model: Model, optimizer: Any) -> None:
    with torch.no_grad():
        model.second.weight[1, 2] = torch.nan
    optimizer.sync_masters_from_model()
    train(model, optimizer, [99])


def big_weights(model: Model, optimizer: Any) -> None:
    with torch.no_grad():
        model.third.weight.fill_(6e4)
    optimizer.sync_masters_from_model()
    train(model, optimizer, [99])


def infinite_activation(model: Model, optimizer: Any) -> None:
    model.blown_up = "third"
    train(model, optimizer, [99])
    model.blown_up = None


def spike(model: Model, optimizer: Any) -> None:
    train(model, optimizer, [99], factor=1e7)


def poisoned_buffer(model: Model, optimizer: Any) -> None:
    model.norm.running_mean[1] = torch.inf
    model.eval()
    train(model, optimizer, [99])
    model.train()


def bad_batch(model: Model, optimizer: Any) -> None:
    def edit(x: Tensor) -> None:
        x[3, 1] = torch.nan

    train(model, optimizer, [99], edit)


FAULTS: dict[str, tuple[Callable[..., None], str, str]] = {
    "a NaN in a layer's weight": (nan_weight, "weights", "second.weight"),
    "weights near 65504": (big_weights, "saturated", "third.weight"),
    "an infinite activation": (infinite_activation, "forward", "inf"),
    "a spike": (spike, "spike", "third.weight"),
    "a poisoned BatchNorm buffer": (poisoned_buffer, "buffers", "norm.running_mean"),
    "a batch with a NaN": (bad_batch, "buffers", "norm.running_mean"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_gets_its_verdict_and_its_name(engine: Engine, name: str) -> None:
    model, optimizer, monitor = make(engine)
    train(model, optimizer, range(25))
    assert monitor.report() is None
    fault, verdict, part = FAULTS[name]
    fault(model, optimizer)
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == verdict, str(report)
    assert not report.verdict.normal
    assert part in str(report)
    assert report.verdict.advice


def test_a_nan_in_a_batch_without_a_buffer_to_damage_is_the_batchs(engine: Engine) -> None:
    model, optimizer, monitor = make(engine)
    train(model, optimizer, range(25))
    model.eval()
    bad_batch(model, optimizer)
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "forward"
    assert "nan before it was scaled" in report.verdict.text


def test_a_nan_that_only_the_backward_pass_makes_is_no_matter_of_scale(engine: Engine) -> None:
    model, optimizer, monitor = make(engine)
    train(model, optimizer, range(25))
    loss = loss_of(model(batch(99))) + (model.first.bias.float() * 0).abs().sqrt().sum()
    optimizer.backward(loss)
    optimizer.step()
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "nan"
    assert [finding.name for finding in report.overflowed] == ["first.bias"]


def test_the_search_is_normal_and_over_after_a_few_steps(engine: Engine) -> None:
    model, optimizer, monitor = make(engine, mpcore.DynamicLossScale(2.0**24))
    verdicts = []
    for seed in range(30):
        train(model, optimizer, [seed])
        report = monitor.report()
        verdicts.append(None if report is None else (report.verdict.name, report.verdict.normal))
    assert verdicts[0] == ("search", True)
    assert set(verdicts) == {("search", True), None}
    assert verdicts[-10:] == [None] * 10


def test_a_probe_is_normal(engine: Engine) -> None:
    scale = mpcore.DynamicLossScale(2.0**14, growth_interval=20)
    model, optimizer, monitor = make(engine, scale)
    found = set()
    for seed in range(150):
        train(model, optimizer, [seed])
        report = monitor.report()
        if report is not None:
            found.add((report.verdict.name, report.verdict.normal))
    assert ("probe", True) in found
    assert {name for name, _ in found} <= {"probe", "search"}


def test_the_floor_is_named(engine: Engine) -> None:
    scale = mpcore.DynamicLossScale(2.0**4, min_scale=2.0**2)
    model, optimizer, monitor = make(engine, scale)
    train(model, optimizer, range(6), factor=1e6)
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "floor"
    assert report.skips_in_a_row == 6


def test_a_scale_that_never_moves_may_be_too_high_from_the_start(engine: Engine) -> None:
    model, optimizer, monitor = make(engine, mpcore.StaticLossScale(2.0**30))
    train(model, optimizer, [0])
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "static"
    train(model, optimizer, range(3), factor=2.0**-20)
    assert monitor.report() is None


def test_a_tiny_loss_shows_in_the_reading(engine: Engine) -> None:
    readings = []
    for factor in (1.0, 1e-6):
        model, optimizer, monitor = make(engine, mpcore.StaticLossScale(2.0**5))
        train(model, optimizer, range(11), factor=factor)
        assert monitor.report() is None
        readings.append(monitor.reading)
    usual, tiny = readings
    assert usual is not None
    assert tiny is not None
    assert usual.subnormal < 0.05
    assert tiny.subnormal > 0.5
    assert tiny.at_scale(20)[0] == 0.0


def test_clean_runs_get_no_report(engine: Engine) -> None:
    model, optimizer, monitor = make(engine, mpcore.StaticLossScale(2.0**5))
    for seed in range(40):
        train(model, optimizer, [seed])
        assert monitor.report() is None


class Difference(nn.Module):
    """Two samples whose gradients are infinities of opposite signs: their sum is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_a_probe_that_leaves_nothing_but_nan_is_a_probe(engine: Engine) -> None:
    model = Difference().half()
    scale = mpcore.DynamicLossScale(2.0**14, growth_interval=20)
    optimizer = engine.wrap(torch.optim.SGD(model.parameters(), lr=1e-6), scale)
    monitor = mpcore.Monitor(optimizer, model, every=1000)
    names = set()
    for _ in range(120):
        output = model(torch.tensor([[4.0], [-4.0]]).half()).float()
        optimizer.backward((output * torch.tensor([[1.0], [-1.0]])).sum())
        optimizer.step()
        optimizer.zero_grad()
        report = monitor.report()
        if report is not None:
            names.add((report.verdict.name, report.overflowed[0].kinds))
    assert names <= {("probe", ("NaN",)), ("search", ("NaN",))}
    assert ("probe", ("NaN",)) in names


def test_the_scale_of_an_outside_scaler_is_not_judged(engine: Engine) -> None:
    model, optimizer, monitor = make(engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    scaler.scale(loss_of(model(batch(0)))).backward()
    scaler.step(optimizer)
    scaler.update()
    report = monitor.report()
    assert report is not None
    assert (report.verdict.name, report.next_scale) == ("other", None)


def test_a_loss_of_its_own_is_seen_and_its_scale_not_judged(engine: Engine) -> None:
    model, optimizer, monitor = make(engine)
    other = optimizer.add_loss("gan", mpcore.DynamicLossScale(2.0**40, max_scale=2.0**40))
    train(model, optimizer, range(3))
    optimizer.backward(loss_of(model(batch(3))))
    other.backward(loss_of(model(batch(3))))
    optimizer.step()
    report = monitor.report()
    assert report is not None
    assert (report.verdict.name, report.next_scale) == ("other", None)
    other.backward(loss_of(model(batch(3))) * torch.nan)
    optimizer.step()
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "forward"


def test_a_pass_that_was_thrown_away_says_nothing_about_the_next_step(engine: Engine) -> None:
    model, optimizer, monitor = make(engine)
    train(model, optimizer, range(8))
    optimizer.backward(loss_of(model(batch(8))) * torch.nan)
    optimizer.zero_grad()
    train(model, optimizer, [9, 10])
    assert monitor.reading is not None
    assert monitor.reading.step == 9
    assert monitor.reading.loss is not None
    spike(model, optimizer)
    assert monitor.report() is not None
    optimizer.step()  # without gradients
    assert monitor.report() is None


def test_a_spike_soon_after_a_resume_is_no_search(engine: Engine) -> None:
    model, optimizer, _ = make(engine, mpcore.StaticLossScale(2.0**10))
    train(model, optimizer, range(120))
    state = copy.deepcopy(optimizer.state_dict())
    fresh, resumed, monitor = make(engine)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    train(fresh, resumed, range(120, 126))
    spike(fresh, resumed)
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "spike"
    assert not report.verdict.normal


def test_the_room_in_float16_is_that_of_the_passes_not_of_their_sums(engine: Engine) -> None:
    model, optimizer, monitor = make(engine)
    largest = 0.0
    for seed in range(20):
        optimizer.backward(loss_of(model(batch(seed))))
        if seed >= 18:  # the step that is read
            halves = [p.grad for p in model.parameters() if p.dtype == torch.float16]
            largest = max(largest, *(float(grad.abs().max()) for grad in halves))
        optimizer.accumulate()
        if seed % 2:
            optimizer.step()
    reading = monitor.reading
    assert reading is not None
    assert reading.headroom_bits == pytest.approx(math.log2(65504 / largest))
    assert reading.grad_norm > 0


def test_a_scale_that_stays_is_not_said_to_go_down(engine: Engine) -> None:
    model, optimizer, monitor = make(engine, mpcore.DynamicLossScale(2.0**24, hysteresis=3))
    train(model, optimizer, [0])
    report = monitor.report()
    assert report is not None
    assert report.next_scale == report.loss_scale
    assert "it goes down if that happens again" in report.verdict.text
