"""What else people do around an optimizer: each does what it does with a plain one."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.profiler import ProfilerActivity, profile

from mpcore_testing.bits import same_bits
from mpcore_testing.blocks import SCALE, Blocks, make, train
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(engine: Engine, reentrant: bool) -> None:
    plain, other = make(engine), make(engine, reentrant)
    hidden = torch.ones((), requires_grad=True)  # a reentrant checkpoint wants an input with one
    for model, optimizer in (plain, other):
        for seed in range(5):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).half()
            optimizer.backward(model(x * hidden.detach().half().requires_grad_()).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))
    assert plain[1].steps == 5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_bit_for_bit_as_the_plain_one(backend: str) -> None:
    engine = Engine("compiled", "fused")
    plain, other = make(engine), make(engine)
    train(*plain, range(4))
    train(torch.compile(other[0], backend=backend), other[1], range(4))
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))
    torch._dynamo.reset()


def test_a_model_compiled_in_place_and_wrapped_afterwards_trains(engine: Engine) -> None:
    model = Blocks().half()
    model.norm.float()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = engine.wrap(torch.optim.AdamW(compiled.named_parameters(), lr=0.05), SCALE)
    plain = make(engine)
    train(compiled, optimizer, range(4))
    train(*plain, range(4))
    weights = [p.detach() for p in model.parameters()]
    assert same_bits(weights, [p.detach() for p in plain[0].parameters()])
    torch._dynamo.reset()


def float32_twin(model: Blocks) -> tuple[Blocks, torch.optim.Optimizer]:
    twin = copy.deepcopy(model).float()
    return twin, torch.optim.AdamW(twin.parameters(), lr=0.05)


def noise(model: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def test_clipping_by_value_by_hand(engine: Engine) -> None:
    """`torch.nn.utils.clip_grad_value_` over the masters: their gradients are unscaled."""
    model, optimizer = make(engine)
    twin, reference = float32_twin(model)
    for seed in range(4):
        scale = optimizer.loss_scale
        optimizer.scale(torch.ones(()))
        for param, other, grad in zip(
            model.parameters(), twin.parameters(), noise(model, seed), strict=True
        ):
            param.grad = (grad * scale).to(param.dtype)
            other.grad = param.grad.float() / scale
        optimizer.unscale_()
        for grad in optimizer.grads():
            grad.clamp_(-0.5, 0.5)
        optimizer.step()
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.5)
        reference.step()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert engine.agree(optimizer.state[param].get("master", param), other, steps=seed + 1)


def test_masters_take_torchs_own_clip_by_value(engine: Engine) -> None:
    model, optimizer = make(engine)
    optimizer.backward(model(torch.ones(2, 4).half()).square().sum() * 100)
    optimizer.unscale_()
    masters = [optimizer.state[p].get("master", p) for p in model.parameters()]
    torch.nn.utils.clip_grad_value_(masters, 2.0**-10)
    assert all(grad.abs().max() <= 2.0**-10 for grad in optimizer.grads())
    optimizer.step()
    assert not optimizer.last_step.skipped


def scaled(model: Any, optimizer: Any) -> None:
    for param in model.parameters():
        param.grad.mul_(0.5)


def replaced(model: Any, optimizer: Any) -> None:
    for param in model.parameters():
        param.grad = param.grad * 0.5


def moved(model: Any, optimizer: Any) -> None:
    for param in model.parameters():
        param.grad.data = param.grad * 0.5


# one of them looks like a clip of scaled gradients, which is warned of
@pytest.mark.filterwarnings("ignore:gradients were made smaller after the backward pass")
@pytest.mark.parametrize("edit", [scaled, replaced, moved])
@pytest.mark.parametrize("looked", [False, True])
def test_gradients_edited_between_backward_and_step_are_what_is_stepped_with(
    engine: Engine, edit: Any, looked: bool
) -> None:
    """Also after the norm was asked for: a clip that does not clip is one look."""
    plain, edited = make(engine), make(engine)

    def halve_the_loss(model: Any, optimizer: Any) -> None:
        for param in model.parameters():  # powers of two: nothing is rounded
            param.grad = param.grad * 0.5

    def after_a_look(model: Any, optimizer: Any) -> None:
        if looked:
            optimizer.clip_grad_norm_(1e30)
        edit(model, optimizer)

    train(*plain, [0, 1, 3, 4], halve_the_loss)
    train(*edited, [0, 1, 3, 4], after_a_look)
    assert same_bits(snapshot(edited[1]), snapshot(plain[1]))


def test_dropping_a_gradient_leaves_its_parameter_out(engine: Engine) -> None:
    model, optimizer = make(engine)
    kept = model.layers[0].weight.detach().clone()

    def drop(model: Any, optimizer: Any) -> None:
        model.layers[0].weight.grad = None

    train(model, optimizer, [0, 1], drop)
    assert torch.equal(model.layers[0].weight, kept)
    assert "exp_avg" not in optimizer.state.get(model.layers[0].weight, {})


def test_a_profiler_sees_the_step_by_name_and_changes_no_bit(engine: Engine) -> None:
    plain, other = make(engine), make(engine)
    train(*plain, range(3))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        train(*other, range(3))
    names = [event.key for event in found.key_averages()]
    assert "Optimizer.step#MixedPrecisionOptimizer.step" in names
    assert "Optimizer.zero_grad#MixedPrecisionOptimizer.zero_grad" in names
    parts = ("inspect", "update") if engine.path == "fused" else ("unscale",)
    assert {f"mpcore.{part}" for part in ("scale", *parts)} <= set(names)
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))


@pytest.mark.parametrize("driver", ["optimizer", "scaler"])
def test_a_scheduler_is_stepped_only_with_the_optimizer(driver: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([weight], lr=1.0)
    scheduler = lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = mpcore.MixedPrecisionOptimizer(inner) if driver == "optimizer" else None
    scaler = None if optimizer else mpcore.GradScaler("cpu")
    told = []
    for size in (torch.inf, 1.0, torch.inf, torch.inf, 1.0):
        if optimizer is not None:
            optimizer.backward((weight * size).sum())
            optimizer.step()
            last = optimizer.last_step
        else:
            assert scaler is not None
            scaler.scale((weight * size).sum()).backward()
            scaler.step(inner)
            scaler.update()
            last = scaler.last_step
        inner.zero_grad()
        told.append(mpcore.step_scheduler(scheduler, last))
    assert told == [False, True, False, False, True]
    assert inner.param_groups[0]["lr"] == 0.25


def test_a_scheduler_that_takes_metrics_gets_them() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=1.0))
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    assert not mpcore.step_scheduler(plateau, optimizer.last_step, 1.0)
    for _ in range(3):
        optimizer.backward(weight.sum())
        optimizer.step()
        optimizer.zero_grad()
        assert mpcore.step_scheduler(plateau, optimizer.last_step, 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
