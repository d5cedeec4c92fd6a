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
from torch.utils.checkpoint import checkpoint

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot

SCALE = mpcore.DynamicLossScale(2.0**8, growth_interval=3)


class Blocks(nn.Module):
    """Three residual layers without matrix products, which are slow in 16 bits on some CPUs."""

    def __init__(self, checkpoints: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.checkpoints = checkpoints

    def block(self, layer: Any, x: Tensor) -> Tensor:
        return x + torch.tanh((x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpoints is None:
                x = self.block(layer, x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.checkpoints)
        return self.norm(x.float())


def make(engine: Engine, checkpoints: bool | None = None, **options: Any) -> tuple[Blocks, Any]:
    model = Blocks(checkpoints).half()
    model.norm.float()
    inner = torch.optim.AdamW(model.named_parameters(), lr=0.05, **options)
    return model, engine.wrap(inner, SCALE)


def train(model: Any, optimizer: Any, seeds: Any, edit: Any = None) -> list[bool]:
    skipped = []
    for seed in seeds:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            x = x * 1e4  # overflows in the backward pass or before it
        optimizer.backward(model(x.half()).square().mean())
        if edit is not None:
            edit(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.last_step.skipped)
    return skipped


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
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))


def test_state_can_be_looked_at_like_that_of_any_optimizer(engine: Engine) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, [0, 1])
    assert list(optimizer.state) == list(model.parameters())
    for param, state in optimizer.state.items():
        names = {"step", "exp_avg", "exp_avg_sq"}
        assert set(state) == names | ({"master"} if param.dtype == torch.float16 else set())
        assert state["exp_avg"].shape == param.shape
        assert {v.dtype for v in state.values()} == {torch.float32}
        assert float(state["step"]) == 2.0
    numbers = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert numbers == sum(
        p.numel() * (3 if p.dtype == torch.float16 else 2) for p in optimizer.state
    )


def edit_in_place(state: Any) -> None:
    state["exp_avg"].zero_()
    state["step"].fill_(1.0)


def edit_entries(state: Any) -> None:
    state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    state["step"] = torch.tensor(1.0)


def edit_all(state: Any) -> None:
    new = {k: v.clone() for k, v in state.items()}
    state.clear()
    state.update(new)
    edit_entries(state)


@pytest.mark.parametrize("edit", [edit_entries, edit_all])
def test_entries_put_into_the_state_are_what_the_next_step_uses(engine: Engine, edit: Any) -> None:
    plain, other = make(engine), make(engine)
    for (model, optimizer), how in ((plain, edit_in_place), (other, edit)):
        train(model, optimizer, [0, 1])
        for state in optimizer.state.values():
            how(state)
        train(model, optimizer, [3, 4])
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))


def test_a_master_put_into_the_state_is_what_the_next_step_uses(engine: Engine) -> None:
    plain, other = make(engine), make(engine)
    for model, optimizer in (plain, other):
        train(model, optimizer, [0, 1])
        param = model.layers[1].weight
        finer = optimizer.state[param]["master"] * (1 + 2.0**-20)  # rounds to the same weight
        if optimizer is other[1]:
            optimizer.state[param]["master"] = finer
        else:
            optimizer.state[param]["master"].copy_(finer)
        assert optimizer.check_masters() == []
        train(model, optimizer, [3, 4])
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))


@pytest.mark.parametrize("everything", [False, True])
def test_clearing_the_state_starts_moments_again_and_keeps_masters(
    engine: Engine, everything: bool
) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, [0, 1])
    masters = [optimizer.state[p]["master"].clone() for p in model.layers.parameters()]
    if everything:
        optimizer.state.clear()
    else:
        for param in model.layers.parameters():
            optimizer.state[param] = {"master": optimizer.state[param]["master"]}
    train(model, optimizer, [3])
    assert float(optimizer.state[model.layers[0].weight]["step"]) == 1.0
    for param, before in zip(model.layers.parameters(), masters, strict=True):
        moved = (optimizer.state[param]["master"] - before).abs().max()
        assert 0 < moved < 0.06  # a first step of Adam is as long as the learning rate


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
