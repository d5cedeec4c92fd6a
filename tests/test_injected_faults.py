"""Faults put into training: each gets its verdict and its name; clean runs get none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine

SCALE = mpcore.DynamicLossScale(2.0**10, growth_interval=30)


class Layer(nn.Module):
    """`x @ w.T + b` without a matrix product, which is slow in 16 bits on some CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class Model(nn.Module):
    """Three layers in float16 with a BatchNorm in float32 between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = Layer(), Layer(), Layer()
        self.norm = nn.BatchNorm1d(4)
        self.blown_up: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second", "third"):
            x = getattr(self, name)(x.half())
            if name != "third":
                x = torch.tanh(x)
            if self.blown_up == name:
                x = x + torch.tensor([torch.inf, 0.0, 0.0, 0.0]).half()
            if name == "second":
                x = self.norm(x.float())
        return x


def make(engine: Engine, scale: Any = SCALE) -> tuple[Model, Any, mpcore.Monitor]:
    model = Model().half()
    model.norm.float()
    optimizer = engine.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), scale)
    return model, optimizer, mpcore.Monitor(optimizer, model, every=10)


def batch(seed: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).half()


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


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


# where each fault shows first when the batch is run again
TRACES = {
    "weight": ("forward", "second"),
    "activation": ("forward", ""),
    "batch": ("batch", "batch"),
    "buffer": ("forward", "norm"),
}


@pytest.mark.parametrize("fault", TRACES)
def test_a_trace_names_the_first_module(fault: str) -> None:
    model, x = Model().half(), batch(0)
    model.norm.float()
    model.eval()
    with torch.no_grad():
        if fault == "weight":
            model.second.weight[1, 2] = torch.nan
        elif fault == "activation":
            model.blown_up = "third"  # in the model itself, between its modules
        elif fault == "batch":
            x[3, 1] = torch.inf
        else:
            assert model.norm.running_mean is not None
            model.norm.running_mean[1] = torch.inf
    trace = mpcore.trace_overflow(model, x, loss_of)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == TRACES[fault]
    assert "->" in str(trace)


def test_a_trace_finds_the_first_module_of_the_backward_pass() -> None:
    model = Model().half()
    model.norm.float()
    clean = mpcore.trace_overflow(model, batch(0), loss_of, loss_scale=2.0**10)
    assert clean.first is None
    assert {frame.phase for frame in clean.frames} == {"batch", "forward", "loss", "backward"}
    trace = mpcore.trace_overflow(model, batch(0), loss_of, loss_scale=2.0**30)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == ("backward", "loss_of")
    with torch.no_grad():
        model.third.weight.mul_(1e4)
    trace = mpcore.trace_overflow(model, batch(0), loss_of, loss_scale=2.0**4)
    assert trace.first is not None
    assert (trace.first.phase, trace.first.module) == ("backward", "third")
    assert trace.first.finite_in


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = Model().half()
    model.norm.float()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    grads = [param.grad for param in model.parameters()]
    before = dict(copy.deepcopy(model.state_dict())), torch.get_rng_state()
    mpcore.trace_overflow(model, (batch(0),), lambda out: loss_of(nn.functional.dropout(out)))
    mpcore.trace_overflow(model, {"x": batch(0)}, loss_of)
    assert same_bits((dict(model.state_dict()), torch.get_rng_state()), before)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    loss_of(model(batch(0))).backward()  # no hook of a parameter is left
