"""Training that goes nowhere is told of once, with numbers; what only looks like it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import Reading
from torch import Tensor, nn
from torch.optim import swa_utils


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
    inner: Any = torch.optim.SGD,
) -> list[str]:
    """Trains and returns what was warned of."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4) if model is None else model
    model = model.to(dtype)
    wrapped = inner([p for p in model.parameters() if p.requires_grad], lr=lr)
    optimizer = mpcore.MixedPrecisionOptimizer(wrapped, scale or mpcore.StaticLossScale(2.0**4))
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


class Adapted(nn.Module):
    """Of two factors the one begins at 0, so that the other has next to no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.zeros(1, 2))  # fewer numbers than the other

    def forward(self, batch: Tensor) -> Tensor:
        return self.base(batch) + batch @ self.down.t() @ self.up.t()


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
        pytest.param(square, {"model": Adapted, "lr": 1e-5}, id="an adapter from 0"),
    ],
)
def test_what_is_healthy_is_not_told_of(loss_of: Any, settings: Any, how: str) -> None:
    model = settings["model"]() if "model" in settings else None
    assert train(loss_of, how=how, **{**settings, "model": model}) == []


def test_an_average_that_is_told_of_as_an_error_loses_no_reading() -> None:
    model = nn.Linear(4, 4, bias=False).half()
    nn.init.ones_(model.weight)
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.5e-3), mpcore.NoLossScale()
    )
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9995))
    records: list[Any] = []
    raised: list[str] = []
    with mpcore.Monitor(optimizer, model, every=20, sinks=[records.append]):
        for _ in range(160):
            optimizer.backward(model.weight.float().sum())
            try:
                optimizer.step()
            except UserWarning as error:
                raised.append(str(error))
            optimizer.zero_grad()
            average.update_parameters(model)
    assert len(raised) == 1
    assert "stands still" in raised[0]
    assert [one.step for one in records if isinstance(one, Reading)] == [*range(19, 160, 20)]
    told = [step for one in records if isinstance(one, Course) for step in range(len(one.skipped))]
    assert len(told) == 160


def test_a_warning_behind_one_that_is_an_error_comes_at_the_next_reading() -> None:
    """An infinite weight that a clamp hides, and gradients that are all 0."""
    weight = nn.Parameter(torch.ones(4).half())
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD([weight], lr=1e-2), mpcore.StaticLossScale(2.0**4)
    )
    raised: list[tuple[int, str]] = []
    with mpcore.Monitor(optimizer, every=20):
        for step in range(100):
            if step == 30:
                with torch.no_grad():
                    weight[0] = torch.inf
                optimizer.sync_masters_from_model()
            optimizer.backward(weight.nan_to_num().float().sum() * 0 + 0.5)
            try:
                optimizer.step()
            except UserWarning as error:
                raised.append((step, str(error)))
            optimizer.zero_grad()
    assert [step for step, _ in raised] == [39, 59]
    assert "all gradients were 0" in raised[0][1]
    assert "Weights are not finite after step 59: " in raised[1][1]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_told_of_where_no_step_is_skipped(
    dtype: torch.dtype, value: float
) -> None:
    model = nn.Linear(100, 100, bias=False).to(dtype)  # more than a sample holds
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.NoLossScale())
    with torch.no_grad():
        model.weight[99, 98] = value
    with mpcore.Monitor(optimizer, model, every=2), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(8):
            optimizer.backward(model.weight.nan_to_num(1.0, 2.0, 2.0).float().square().mean())
            optimizer.step()
            optimizer.zero_grad()
    (text,) = [str(one.message) for one in found]
    assert text.startswith("Weights are not finite after step 1: weight. No gradient shows it")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_from_0_do_not_hide_that_no_weight_moves(dtype: torch.dtype) -> None:
    def zeros(lr: float) -> list[str]:
        model = nn.Linear(4, 4)
        nn.init.zeros_(model.bias)
        return train(square, model=model, dtype=dtype, lr=lr, scale=mpcore.StaticLossScale(1.0))

    (text,) = zeros(1e-13)
    assert "no FP32 master of the sample changed but for those near 0" in text
    assert zeros(1e-6) == []


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_updates_that_are_lost_are_told_of_with_any_optimizer(optimizer: Any) -> None:
    """Adam's updates are as large as the learning rate, whatever the gradients."""
    (text,) = train(square, inner=optimizer, lr=1e-12)
    assert "no weight moves" in text
    assert train(square, inner=optimizer, lr=1e-5) == []


def test_each_of_two_optimizers_is_judged_by_itself() -> None:
    models = [nn.Linear(4, 4).half() for _ in range(2)]
    rates = (1e-13, 1e-3)
    optimizers = [
        mpcore.MixedPrecisionOptimizer(
            torch.optim.SGD(model.parameters(), lr=lr), mpcore.StaticLossScale(2.0**4)
        )
        for model, lr in zip(models, rates, strict=True)
    ]
    said: list[list[str]] = [[], []]
    for optimizer, model in zip(optimizers, models, strict=True):
        mpcore.Monitor(optimizer, model, every=8)
    for step in range(70):
        batch = torch.randn(8, 4).half()
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.backward(square(model, batch, step))
        for texts, optimizer in zip(said, optimizers, strict=True):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                optimizer.step()
            texts += [str(one.message) for one in found]
            optimizer.zero_grad()
    assert len(said[0]) == 1
    assert "learning rate is 1e-13" in said[0][0]
    assert said[1] == []


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
