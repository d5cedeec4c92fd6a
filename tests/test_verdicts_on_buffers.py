"""Which buffers a report blames: those that were damaged, and no mask."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.model_state import BufferWatch
from torch import Tensor, nn

from mpcore_testing.engines import Engine
from mpcore_testing.syncs import fake_cuda

INF, NAN = torch.inf, torch.nan


def causal(size: int) -> Tensor:
    return torch.full((size, size), -INF).triu(1)


class Attention(nn.Module):
    """One weight behind a mask, without a matrix product."""

    def __init__(self, mask: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", mask, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.weight).unsqueeze(-1).float() + self.mask.float()).softmax(-1)


def verdict_at_skip(engine: Engine, model: nn.Module, change: Any = None) -> Any:
    scale = mpcore.DynamicLossScale(2.0**24)
    optimizer = engine.wrap(torch.optim.SGD(model.parameters(), lr=0.1), scale)
    monitor = mpcore.Monitor(optimizer, model)
    if change is not None:
        change(model)
    optimizer.backward(model.weight.float().sum() * 8)
    optimizer.step()
    report = monitor.report()
    assert report is not None
    return report.verdict


@pytest.mark.parametrize("persistent", [True, False])
def test_a_mask_of_infinities_does_not_hide_the_search(engine: Engine, persistent: bool) -> None:
    model = Attention(causal(3), persistent=persistent).half()
    assert verdict_at_skip(engine, model).name == "search"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: setattr(m, "mask", causal(5)), "search"),
        (lambda m: m.mask.fill_(-INF), "search"),
        (lambda m: m.register_buffer("slopes", causal(3) + 0.5), "search"),
        (lambda m: m.mask[0].fill_(NAN), "buffers"),
        (lambda m: m.mask[1].fill_(INF), "buffers"),
        (lambda m: m.register_buffer("average", torch.tensor([NAN, 1.0])), "buffers"),
    ],
)
def test_a_mask_may_change_and_come_later_but_not_be_nan(
    engine: Engine, change: Any, name: str
) -> None:
    verdict = verdict_at_skip(engine, Attention(causal(3)).half(), change)
    assert verdict.name == name, verdict
    assert verdict.normal == (name == "search")


def test_a_mask_that_is_filled_later_is_a_mask(engine: Engine) -> None:
    model = Attention(torch.zeros(3, 3)).half()
    verdict = verdict_at_skip(engine, model, lambda m: m.mask.copy_(causal(3)))
    assert verdict.name == "search"


def test_infinities_among_other_numbers_are_damage(engine: Engine) -> None:
    model = Attention(torch.ones(3, 3)).half()
    verdict = verdict_at_skip(engine, model, lambda m: m.mask[0].fill_(-INF))
    assert verdict.name == "buffers"
    assert "mask" in verdict.text


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_statistics_that_were_damaged_before_are_blamed(statistic: str, value: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    getattr(model[0], statistic)[:] = value
    assert BufferWatch(model).damaged() == [f"0.{statistic}"]


def test_buffers_that_cannot_be_infinite_or_looked_at_are_left_out() -> None:
    model = nn.Module()
    model.register_buffer("count", torch.ones(2, dtype=torch.int64))
    model.register_buffer("graph", torch.eye(3).to_sparse())
    model.register_buffer("eighth", torch.ones(2).to(torch.float8_e4m3fn))
    model.register_buffer("empty", torch.ones(0))
    model.register_buffer("none", None)
    assert BufferWatch(model).damaged() == []
    assert BufferWatch(None).damaged() == []


def test_attaching_asks_no_device() -> None:
    with fake_cuda() as watch:
        model = nn.Module()
        model.register_buffer("mask", torch.zeros(3, device="cuda"))
        BufferWatch(model)
        assert watch.reads == 0
