"""Deep copies and pickles of (model, optimizer) go on exactly as the original; EMA beside it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpcore_testing.engines import Engine, engine_cases
from mpcore_testing.lengths import each_in_turn


def applied(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` without a matrix product, which is slow in 16 bits on some CPUs."""
    return (x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias


class Pair(nn.Module):
    """A 16-bit layer of each kind and a float32 one; its float16 gradients overflow at 2^16."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(4, 4).half()
        self.brain = nn.Linear(4, 4).bfloat16()
        self.single = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.single(applied(self.brain, applied(self.low, x.half()).bfloat16()).float())


INNERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=torch.tensor(0.01)),
}


def make(
    engine: Engine, name: str, named: bool = False
) -> tuple[Pair, mpcore.MixedPrecisionOptimizer]:
    torch.manual_seed(0)
    model = Pair()
    inner = INNERS[name](model.named_parameters() if named else model.parameters())
    scale = mpcore.DynamicLossScale(init=2.0**20, growth_interval=4)
    return model, engine.wrap(inner, scale)


def train(model: Any, optimizer: Any, first: int, count: int, update: Any = None) -> None:
    for seed in range(first, first + count):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        optimizer.backward(model(x).square().mean())
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        if update is not None:
            update(model)


def contents(model: nn.Module, optimizer: Any) -> list[Any]:
    """Weights, masters, state and scale, as patterns."""
    found: list[Any] = [optimizer.state_dict()["mpcore"]]
    for name, param in model.named_parameters():
        found.append((name, param.detach().view(-1).view(torch.uint8).numpy().tobytes()))
        for key, value in sorted(optimizer.state[param].items()):
            if isinstance(value, Tensor):
                found.append(
                    (key, str(value.dtype), value.reshape(-1).view(torch.uint8).numpy().tobytes())
                )
            else:
                found.append((key, value))
    return found


def by_deepcopy(pair: Any) -> Any:
    return copy.deepcopy(pair)


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = [by_deepcopy, by_pickle, by_torch_save]


# steps decide what there is to copy, and the way how: every way meets every stop, on some engine
@pytest.mark.parametrize("steps", [0, 1, 9])
@pytest.mark.parametrize(("name", "engine", "duplicate"), each_in_turn(engine_cases(INNERS), WAYS))
def test_a_copy_is_independent_and_continues_bit_for_bit(
    engine: Engine, name: str, steps: int, duplicate: Any
) -> None:
    model, optimizer = make(engine, name)
    train(model, optimizer, 0, steps)
    optimizer.zero_grad()
    before = contents(model, optimizer)
    other_model, other = duplicate((model, optimizer))
    assert contents(other_model, other) == before
    train(other_model, other, steps, 5)
    assert contents(model, optimizer) == before, "the copy shares something with the original"
    train(model, optimizer, steps, 5)
    assert contents(other_model, other) == contents(model, optimizer)
    assert optimizer.skipped_steps > 0


def test_the_copy_is_wired_like_the_original(engine: Engine) -> None:
    model, optimizer = make(engine, "AdamW", named=True)
    train(model, optimizer, 0, 6)
    other_model, other = copy.deepcopy((model, optimizer))
    assert type(other) is mpcore.MixedPrecisionOptimizer
    assert other.param_groups is other.inner.param_groups
    assert other.param_groups[0]["params"][0] is other_model.low.weight
    assert other.loss_scaling == optimizer.loss_scaling
    with pytest.raises(mpcore.StageError, match="direct call"):
        other.inner.step()
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.0)
    train(other_model, other, 6, 1)
    scheduler.step()
    frozen = other_model.low.weight.detach().clone()
    train(other_model, other, 7, 1)
    assert torch.equal(other_model.low.weight, frozen)
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("target", ["wrapper", "inner"])
def test_an_optimizer_under_a_scheduler_can_be_copied(engine: Engine, target: str) -> None:
    model, optimizer = make(engine, "SGD")
    torch.optim.lr_scheduler.StepLR(optimizer if target == "wrapper" else optimizer.inner, 1)
    train(model, optimizer, 0, 6)
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 6, 2)
    before = contents(other_model, other)
    train(other_model, other, 6, 2)
    assert contents(other_model, other) == contents(model, optimizer) != before


def test_a_copy_taken_between_unscale_and_step_is_one_taken_before_the_step(engine: Engine) -> None:
    model, optimizer = make(engine, "SGD")
    train(model, optimizer, 0, 6)
    before = contents(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(2, 4)).mean())
    optimizer.unscale_()
    other_model, other = copy.deepcopy((model, optimizer))
    assert contents(other_model, other) == before
    train(other_model, other, 6, 3)
    optimizer.zero_grad()
    train(model, optimizer, 6, 3)
    assert contents(other_model, other) == contents(model, optimizer)


def test_an_exponential_moving_average_beside_it_changes_nothing(engine: Engine) -> None:
    model, optimizer = make(engine, "AdamW")
    other_model, other = make(engine, "AdamW")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(model, optimizer, 0, 8, average.update_parameters)
    train(other_model, other, 0, 8)
    assert contents(model, optimizer) == contents(other_model, other)
    assert not torch.equal(average.module.single.weight, model.single.weight)
    assert average.module.low.weight.dtype == torch.float16


@pytest.mark.parametrize("duplicate", WAYS)
@pytest.mark.parametrize("writes", [0, 1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_written_to_the_weights_of_a_copy_is_adopted(
    engine: Engine, duplicate: Any, writes: int, when: str
) -> None:
    """A copy counts its writes anew, and so may arrive at the number that its original had."""
    pair: Any = make(engine, "SGD")
    train(*pair, 0, 1)

    @torch.no_grad()
    def write() -> None:
        for _ in range(writes):
            pair[0].low.weight[0].add_(1.0)

    if when == "before":
        write()
    pair = duplicate(pair)
    if when == "after":
        write()
    model, optimizer = pair
    written = model.low.weight[0].detach().clone()
    if writes:
        with pytest.warns(UserWarning, match="^4 elements of group 0, parameter 0"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(model.low.weight[0], written)
    assert optimizer.check_masters() == []
