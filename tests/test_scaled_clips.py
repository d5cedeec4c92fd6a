"""A clip of gradients that are still scaled: one warning, and none for what is legal."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import mpcore
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpcore_testing.engines import Engine

SCALE = 2.0**8


def make(engine: Engine, scale: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).half()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, engine.wrap(inner, scale or mpcore.StaticLossScale(SCALE))


def loss_of(model: nn.Module, number: int = 0) -> torch.Tensor:
    return model(torch.full((2, 4), 1.0 + number / 8).half()).float().square().mean()


def clip(model: nn.Module, max_norm: float = 1e-3) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


@pytest.mark.parametrize("way", ["backward", "scale", "list", "unscale_", "accumulate", "closure"])
def test_a_clip_of_scaled_gradients_is_warned_of_once(engine: Engine, way: str) -> None:
    model, optimizer = make(engine)

    def run() -> None:
        if way == "scale":
            optimizer.scale(loss_of(model)).backward()
        elif way == "list":
            optimizer.scale([loss_of(model)])[0].backward()
        else:
            optimizer.backward(loss_of(model))
        clip(model)
        if way == "unscale_":
            optimizer.unscale_()
        elif way == "accumulate":
            optimizer.accumulate()

    def run_and_step() -> None:
        if way == "closure":
            optimizer.step(run)
        else:
            run()
            optimizer.step()

    with pytest.warns(UserWarning, match="while the loss scale was still in them.*unscale_"):
        run_and_step()
    optimizer.zero_grad()
    optimizer.backward(loss_of(model))
    clip(model)
    optimizer.step()  # warnings are errors


def test_a_clip_of_the_largest_element_alone_is_warned_of(engine: Engine) -> None:
    model, optimizer = make(engine)
    optimizer.backward(loss_of(model))
    small, large = model[1].bias.grad.abs().sort().values.tolist()
    torch.nn.utils.clip_grad_value_(model.parameters(), (small + large) / 2)
    assert small == model[1].bias.grad.abs().min() < model[1].bias.grad.abs().max() < large
    with pytest.warns(UserWarning, match="while the loss scale was still in them"):
        optimizer.step()


def test_an_empty_parameter_is_not_what_is_looked_at(engine: Engine) -> None:
    model, optimizer = make(engine)
    model[0].register_parameter("empty", nn.Parameter(torch.zeros(0).half()))
    optimizer.add_param_group({"params": [model[0].empty]})
    optimizer.backward(loss_of(model) + model[0].empty.float().sum())
    clip(model)
    with pytest.warns(UserWarning, match="while the loss scale was still in them"):
        optimizer.step()


def norm_logger(model: nn.Module, optimizer: Any) -> None:
    clip(model, float("inf"))


def loose_clip(model: nn.Module, optimizer: Any) -> None:
    clip(model, 1e6)


def after_unscale(model: nn.Module, optimizer: Any) -> None:
    optimizer.unscale_()
    clip(model)


def our_clip(model: nn.Module, optimizer: Any) -> None:
    optimizer.clip_grad_norm_(1e-3)


def second_pass(model: nn.Module, optimizer: Any) -> None:
    optimizer.backward(loss_of(model) * -0.5)  # smaller by more passes, not by a clip


def enlarge(model: nn.Module, optimizer: Any) -> None:
    for param in model.parameters():
        param.grad.mul_(2.0)


def average(model: nn.Module, optimizer: Any) -> None:
    for param in model.parameters():  # with another rank, whose gradients are larger here and there
        param.grad.view(-1)[::2].mul_(0.5)
        param.grad.view(-1)[1::2].mul_(1.5)


LEGAL = [norm_logger, loose_clip, after_unscale, our_clip, second_pass, enlarge, average]


@pytest.mark.parametrize("what", LEGAL)
@pytest.mark.parametrize("clears", ["None", "zeros", "model", "nothing"])
def test_what_is_legal_is_not_warned_of(engine: Engine, what: Any, clears: str) -> None:
    model, optimizer = make(engine)
    for number in range(3):
        optimizer.backward(loss_of(model, number))
        what(model, optimizer)
        optimizer.step()
        if clears == "model":
            model.zero_grad(set_to_none=False)
        elif clears != "nothing":
            optimizer.zero_grad(set_to_none=clears == "None")


def test_an_overflow_under_a_norm_logger_is_not_warned_of(engine: Engine) -> None:
    model, optimizer = make(engine)
    optimizer.backward(loss_of(model) * torch.inf)
    clip(model, float("inf"))
    optimizer.step()
    assert optimizer.last_step.skipped


def test_reentrant_checkpointing_is_not_warned_of(engine: Engine) -> None:
    model, optimizer = make(engine)
    layer = nn.Linear(4, 4).half()
    optimizer.add_param_group({"params": [*layer.parameters()]})
    for _ in range(2):
        x = torch.ones(2, 4).half().requires_grad_()
        for _ in range(3):
            x = checkpoint(layer, x, use_reentrant=True)
        optimizer.backward(model(x).float().mean())
        optimizer.step()
        optimizer.zero_grad()


def test_clips_without_a_loss_scale_are_right(engine: Engine) -> None:
    model, optimizer = make(engine, mpcore.NoLossScale())
    optimizer.backward(loss_of(model))
    clip(model)
    optimizer.step()


def test_averaging_by_hand_is_warned_of_and_changes_nothing(engine: Engine) -> None:
    model, optimizer = make(engine)
    other_model, other = copy.deepcopy((model, optimizer))
    optimizer.backward(loss_of(model))
    for param in model.parameters():
        param.grad.div_(2.0)
    with pytest.warns(UserWarning, match="Nothing is wrong if you averaged"):
        optimizer.step()
    other.backward(loss_of(other_model) / 2)
    other.step()
    for param, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(param, twin)


def test_optimizers_are_let_go(engine: Engine) -> None:
    model, optimizer = make(engine)
    loss = optimizer.scale(loss_of(model))
    del optimizer
    with warnings.catch_warnings(record=True) as seen:
        loss.backward()
    assert not seen


@pytest.mark.parametrize("as_list", [False, True])
def test_a_clip_under_a_grad_scaler_is_warned_of_from_the_second_step_on(
    engine: Engine, as_list: bool
) -> None:
    model, optimizer = make(engine)
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE)

    def run() -> None:
        optimizer.zero_grad()
        loss = loss_of(model)
        (scaler.scale([loss])[0] if as_list else scaler.scale(loss)).backward()
        clip(model)
        scaler.step(optimizer)
        scaler.update()

    run()
    with pytest.warns(UserWarning, match="while the loss scale was still in them.*fp16"):
        run()
    run()  # warnings are errors


def test_a_grad_scaler_warns_of_no_clip_after_unscale(engine: Engine) -> None:
    model, optimizer = make(engine)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE)
    for number in range(4):  # warnings are errors
        optimizer.zero_grad()
        both = [loss_of(model, number), other.param_groups[0]["params"][0]]
        for outputs in scaler.scale([iter(both)]):  # what is scaled late is left alone
            for output in outputs:
                output.sum().backward()
        scaler.unscale_(optimizer)
        clip(model)
        for each in (optimizer, other):
            scaler.step(each)
        scaler.update()
