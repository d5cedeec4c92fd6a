"""Training that goes nowhere is told of once, with numbers; what only looks like it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn


def train(
    loss_of: Callable[[nn.Module, Tensor, int], Tensor],
    *,
    steps: int = 70,
    lr: float = 1e-2,
    scale: Any = None,
    dtype: torch.dtype = torch.float16,
    how: str = "plain",
    model: Any = None,
    every: int = 8,
) -> list[str]:
    """Trains and returns what was warned of."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4) if model is None else model
    model = model.to(dtype)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, scale or mpcore.StaticLossScale(2.0**4))
    outside = torch.amp.GradScaler("cpu", init_scale=2.0**4) if how == "outside" else None
    monitor = mpcore.Monitor(optimizer, model, every=every)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            batch = torch.randn(8, 4).to(dtype)

            def evaluate(batch: Tensor = batch, step: int = step) -> Tensor:
                loss = loss_of(model, batch, step)
                optimizer.backward(loss)
                return loss

            if outside is not None:
                loss = loss_of(model, batch, step)
                monitor.see_loss(loss)
                outside.scale(loss).backward()
                outside.step(optimizer)
                outside.update()
            elif how == "closure":
                optimizer.step(lambda: (optimizer.zero_grad(), evaluate())[1])
            else:
                for _ in range(2 if how == "accumulate" else 1):
                    evaluate()
                    if how == "accumulate":
                        optimizer.accumulate()
                optimizer.step()
            optimizer.zero_grad()
    return [str(one.message) for one in caught if "said once" in str(one.message)]


def square(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    return model(batch).float().square().mean() + 0.5


HOWS = ["plain", "accumulate", "closure", "outside"]


@pytest.mark.parametrize("how", HOWS)
def test_gradients_that_are_all_zero_are_told_of_once(how: str) -> None:
    (text,) = train(lambda *a: square(*a) * 0 + 0.5, how=how)
    assert "all gradients were 0 in each of the last 32 steps, at a loss scale of 16" in text
    assert "the loss was" in text


def test_gradients_that_flush_are_zero() -> None:
    (text,) = train(lambda *a: square(*a) * 1e-9, dtype=torch.float16)
    assert "flushed to 0" in text
    assert train(lambda *a: square(*a) * 1e-9, dtype=torch.bfloat16, lr=1e7) == []


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_that_are_all_lost_are_told_of_once(how: str, dtype: torch.dtype) -> None:
    scale = mpcore.NoLossScale() if dtype == torch.bfloat16 else None
    (text,) = train(square, how=how, dtype=dtype, lr=1e-13, scale=scale)
    assert "no weight moves: in each of 5 readings from step 7 to 39" in text
    assert "learning rate is 1e-13" in text


def test_only_skips_of_an_outside_scaler_are_told_of_once() -> None:
    (text,) = train(lambda *a: square(*a) * float("nan"), how="outside", steps=220)
    assert "each of the last 100 steps was skipped by an outside scaler" in text


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20000, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.table((batch[:, 0].abs() * 5).long())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.second(self.first(batch))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("loss_of", "settings"),
    [
        pytest.param(square, {}, id="training"),
        pytest.param(square, {"lr": 0.0}, id="lr 0 in warm-up"),
        pytest.param(lambda *a: square(*a) * 0, {}, id="a loss of 0"),
        pytest.param(lambda *a: square(*a) * (a[2] % 20 == 0) + 0.5, {}, id="some zeros"),
        pytest.param(square, {"model": Embedded}, id="sparse rows"),
        pytest.param(square, {"model": Frozen}, id="frozen layers"),
        pytest.param(square, {"lr": 1e-13, "steps": 30}, id="not for long"),
    ],
)
def test_what_is_healthy_is_not_told_of(loss_of: Any, settings: Any, how: str) -> None:
    model = settings["model"]() if "model" in settings else None
    assert train(loss_of, how=how, **{**settings, "model": model}) == []


def test_readings_before_a_load_do_not_count() -> None:
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD([weight], lr=1e-13), mpcore.StaticLossScale(1.0)
    )
    mpcore.Monitor(optimizer, every=1)
    saved = optimizer.state_dict()
    for _ in range(3):
        optimizer.load_state_dict(saved)
        for _ in range(20):  # 60 together, and never 32 in a row
            optimizer.backward(weight.float().sum())
            optimizer.step()
            optimizer.zero_grad()


def test_where_warnings_are_errors_sinks_have_every_reading_all_the_same() -> None:
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=1e-12))
    records: list[Any] = []
    raised = 0
    with mpcore.Monitor(optimizer, every=8, sinks=[records.append]):
        for _ in range(48):
            optimizer.backward(weight.float().sum())
            try:
                optimizer.step()
            except UserWarning:
                raised += 1
            optimizer.zero_grad()
    readings = [one.step for one in records if hasattr(one, "headroom_bits")]
    assert (raised, readings) == (1, list(range(7, 48, 8)))
