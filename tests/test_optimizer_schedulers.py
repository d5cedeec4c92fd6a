"""Every learning-rate scheduler of torch, on the wrapper and on the inner optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from mpcore_testing.engines import Engine

LR = 0.1
STEPS = 12
OVERFLOW_AT = 4


def chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer: Any) -> Any:
    first = lr_scheduler.ConstantLR(optimizer)
    second = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])


MAKERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, LR, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


def sgd(params: Any, lr: Any = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def make(lr: Any = LR) -> tuple[list[nn.Parameter], torch.optim.Optimizer, list[nn.Parameter]]:
    """Returns 16-bit and float32 parameters, their inner optimizer, and float32 copies."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    params = [nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for dtype in dtypes]
    copies = [nn.Parameter(p.detach().float().clone()) for p in params]
    return params, sgd(params, lr), copies


def assert_driven(
    engine: Engine,
    optimizer: mpcore.MixedPrecisionOptimizer,
    scheduler: Any,
    reference: torch.optim.Optimizer,
    reference_scheduler: Any,
) -> None:
    """Trains both with one overflow and compares weights, learning rates and momentum."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    copies = [p for group in reference.param_groups for p in group["params"]]
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    rates = set()
    for step in range(STEPS):
        scale = optimizer.scale(torch.ones(())).item()
        for param, copy in zip(params, copies, strict=True):
            param.grad = (torch.linspace(-1, 2, 6) * (step + 1) * scale).to(param.dtype)
            copy.grad = param.grad.float() / scale
        if step == OVERFLOW_AT:
            params[0].grad[0] = torch.inf
        optimizer.step()
        if step != OVERFLOW_AT:
            reference.step()
        for one in (scheduler, reference_scheduler):
            _ = one.step(1.0) if plateau else one.step()
        rates.add(float(optimizer.param_groups[0]["lr"]))
        for key in ("lr", "momentum"):
            assert optimizer.param_groups[0][key] == reference.param_groups[0][key]
        for param, copy in zip(params, copies, strict=True):
            master: Tensor = optimizer.state[param].get("master", param)
            assert engine.agree(master, copy, steps=step + 1)
            assert torch.equal(param, master.to(param.dtype))
    assert len(rates) > 1, "the scheduler never moved the learning rate"
    assert optimizer.skipped_steps == 1


def test_the_table_below_covers_every_scheduler_of_torch() -> None:
    found = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler)
    } - {"LRScheduler", "_LRScheduler"}
    assert found <= set(MAKERS)


@pytest.mark.parametrize("target", ["wrapper", "inner before wrapping", "inner after wrapping"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_scheduler_drives_the_step_from_wherever_it_is_built(
    engine: Engine, name: str, target: str
) -> None:
    _, inner, copies = make()
    early = MAKERS[name](inner) if target == "inner before wrapping" else None
    optimizer = engine.wrap(inner, mpcore.DynamicLossScale(init=64.0))
    scheduler = early or MAKERS[name](optimizer if target == "wrapper" else inner)
    reference = sgd(copies)
    assert_driven(engine, optimizer, scheduler, reference, MAKERS[name](reference))


@pytest.mark.parametrize("target", ["wrapper", "inner"])
@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "OneCycleLR"])
def test_a_tensor_learning_rate_is_scheduled_in_place(
    engine: Engine, name: str, target: str
) -> None:
    rate = torch.tensor(LR)
    _, inner, copies = make(rate)
    optimizer = engine.wrap(inner, mpcore.DynamicLossScale(init=64.0))
    scheduler = MAKERS[name](optimizer if target == "wrapper" else inner)
    reference = sgd(copies, torch.tensor(LR))
    assert_driven(engine, optimizer, scheduler, reference, MAKERS[name](reference))
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_scheduler_on_the_wrapper_does_not_warn_when_the_first_step_is_skipped(
    engine: Engine,
) -> None:
    params, inner, _ = make()
    optimizer = engine.wrap(inner)
    scheduler = MAKERS["StepLR"](optimizer)
    optimizer.backward((params[0].float() * torch.inf).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    assert optimizer.last_step.skipped


def test_a_scheduler_stepped_before_the_optimizer_still_warns(engine: Engine) -> None:
    _, inner, _ = make()
    scheduler = MAKERS["StepLR"](engine.wrap(inner))
    with pytest.warns(UserWarning, match=r"before `optimizer\.step\(\)`"):
        scheduler.step()


def test_a_group_added_later_is_scheduled_with_the_others(engine: Engine) -> None:
    params, inner, _ = make()
    optimizer = engine.wrap(inner, mpcore.NoLossScale())
    late = nn.Parameter(torch.ones(2).half())
    optimizer.add_param_group({"params": [late], "lr": 1.0})
    scheduler = lr_scheduler.StepLR(inner, 1, gamma=0.5)
    for param in [*params, late]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    scheduler.step()
    optimizer.step()
    # 1 - 1.0 * 1 - 0.5 * (0.9 + 1), rounded once from the float32 master
    master = optimizer.state[late]["master"]
    assert master[0].item() == pytest.approx(-0.95, rel=1e-6)  # two float32 roundings
    assert torch.equal(late, master.half())


def test_hyperparameters_edited_through_either_object_reach_the_step(engine: Engine) -> None:
    params, inner, _ = make()
    optimizer = engine.wrap(inner, mpcore.NoLossScale())
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["lr"] = 0.0
    inner.param_groups[0]["momentum"] = 0.0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    inner.param_groups[0]["lr"] = 0.5
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, (old.float() - 0.5).to(param.dtype))
