"""A step over all-zero gradients before training creates state, and does nothing else."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
)

from mpcore_testing.engines import GENERAL, Engine, engine_cases

INNERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
}
SCALES = [
    mpcore.DynamicLossScale(init=2.0**8, growth_interval=2),
    mpcore.StaticLossScale(64.0),
    mpcore.NoLossScale(),
]
NAMES = sorted(INNERS)


def applied(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` without a matrix product, which is slow in 16 bits on some CPUs."""
    return (x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(3, 3).half()
        self.brain = nn.Linear(3, 3).bfloat16()
        self.single = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.single(applied(self.brain, applied(self.low, x.half()).bfloat16()).float())


def make(
    engine: Engine, name: str, scale: Any = SCALES[0]
) -> tuple[Pair, mpcore.MixedPrecisionOptimizer]:
    torch.manual_seed(0)
    model = Pair()
    return model, engine.wrap(INNERS[name](model.parameters()), scale)


def copies_of(model: nn.Module) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float().clone()) for p in model.parameters()]


def zero_gradients(params: Any) -> None:
    for param in params:
        param.grad = torch.zeros_like(param)


def patterns(tensor: Tensor) -> Any:
    raw = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), raw


def state_of(state: Any) -> Any:
    return {k: patterns(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def train(model: Any, optimizer: Any, steps: int, copies: Any = (), reference: Any = None) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.backward(model(x).square().mean())
        scale = optimizer.loss_scale
        for param, twin in zip(model.parameters(), copies, strict=False):
            twin.grad = param.grad.float() / scale
        optimizer.step()
        if reference is not None:
            reference.step()


def assert_same(model: nn.Module, optimizer: Any, copies: Any, reference: Any) -> None:
    for param, twin in zip(model.parameters(), copies, strict=True):
        state = dict(optimizer.state[param])
        if "step" not in reference.state[twin]:
            state.pop("step", None)  # which only fused steps count
        assert patterns(state.pop("master", param)) == patterns(twin)
        assert patterns(param) == patterns(twin.to(param.dtype))
        assert state_of(state) == state_of(reference.state[twin])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_zeros_before_training_create_the_state_torch_would_and_nothing_else(
    engine: Engine, name: str, scale: Any
) -> None:
    model, optimizer = make(engine, name, scale)
    copies = copies_of(model)
    reference = INNERS[name](copies)
    values = [twin.detach().clone() for twin in copies]
    before, numbers = [patterns(p) for p in model.parameters()], optimizer.state_dict()["mpcore"]
    zero_gradients(model.parameters())
    zero_gradients(copies)
    assert optimizer.step(closure=None) is None
    reference.step()
    assert [patterns(p) for p in model.parameters()] == before
    assert optimizer.state_dict()["mpcore"] == numbers
    assert optimizer.last_step is None
    with torch.no_grad():  # decay moves the plain optimizer's weights; here they stay
        for twin, value in zip(copies, values, strict=True):
            twin.copy_(value)
    assert_same(model, optimizer, copies, reference)
    train(model, optimizer, 4, copies, reference)
    if not engine.fused:  # whose steps are not torch's to the last bit
        assert_same(model, optimizer, copies, reference)
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_reading_state_for_a_distributed_checkpoint_before_training_moves_nothing(
    engine: Engine, name: str, scale: Any
) -> None:
    model, optimizer = make(engine, name, scale)
    copies = copies_of(model)
    before, numbers = [patterns(p) for p in model.parameters()], optimizer.state_dict()["mpcore"]
    rate = optimizer.param_groups[0]["lr"]
    found = get_optimizer_state_dict(model, optimizer)
    assert [patterns(p) for p in model.parameters()] == before
    assert [patterns(optimizer.state[p].get("master", p)) for p in model.parameters()] == [
        patterns(twin) for twin in copies
    ] or name == "Adagrad"  # has state from its constructor, so no step is taken and no master made
    assert optimizer.state_dict()["mpcore"] == numbers
    assert all(param.grad is None for param in model.parameters())
    assert optimizer.param_groups[0]["lr"] == rate
    assert set(found["state"]) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_training_after_a_distributed_checkpoint_read_state_equals_torchs(name: str) -> None:
    model, optimizer = make(GENERAL, name)
    plain = Pair().float()
    copies = list(plain.parameters())
    with torch.no_grad():
        for twin, param in zip(copies, model.parameters(), strict=True):
            twin.copy_(param)
    reference = INNERS[name](copies)
    get_optimizer_state_dict(model, optimizer)
    get_optimizer_state_dict(plain, reference)
    train(model, optimizer, 5, copies, reference)
    assert optimizer.skipped_steps == 0
    assert_same(model, optimizer, copies, reference)


def test_zeros_in_part_of_the_weights_create_only_their_state(engine: Engine) -> None:
    model, optimizer = make(engine, "AdamW")
    zero_gradients(model.low.parameters())
    optimizer.step()
    assert set(optimizer.state) == set(model.low.parameters())
    assert optimizer.steps == 0


def test_zeros_of_a_backward_pass_of_ours_are_an_ordinary_step(engine: Engine) -> None:
    model, optimizer = make(engine, "SGD", mpcore.NoLossScale())
    weight = model.single.weight.detach().clone()
    optimizer.backward(model(torch.ones(2, 3)).sum() * 0.0)
    optimizer.step()
    assert optimizer.steps == 1
    assert torch.equal(model.single.weight, weight.add(weight * 0.1, alpha=-0.1))


def test_one_gradient_of_zeros_among_others_is_an_ordinary_step(engine: Engine) -> None:
    params = [nn.Parameter(torch.ones(3).half()) for _ in range(2)]
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.5), mpcore.NoLossScale())
    (params[0].float().sum() + params[1].float().sum() * 0).backward()
    optimizer.step()
    assert [p.tolist() for p in params] == [[0.5] * 3, [1.0] * 3]
    assert optimizer.steps == 1
