"""`torch.distributed.checkpoint`, on one process: everything comes back, flattened or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine, engine_cases
from mpcore_testing.snapshots import snapshot

pytestmark = pytest.mark.filterwarnings(
    # torch's own, of a checkpoint without a process group
    "ignore:torch.distributed is disabled, unavailable or uninitialized",
    "ignore:.*_sharded_tensor:FutureWarning",
)
OPTIONS = [
    StateDictOptions(),
    StateDictOptions(flatten_optimizer_state_dict=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True),
]
INNERS: dict[str, Any] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.05),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 2)


def make(engine: Engine, name: str, named: bool, *, cast: bool = False) -> tuple[Model, Any]:
    model = Model()
    first = [*model.first.named_parameters(prefix="first")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("first")]
    groups = [{"params": first, "lr": 0.02}, {"params": rest}]
    if not named:
        groups = [{**g, "params": [p for _, p in g["params"]]} for g in groups]  # type: ignore[misc,dict-item,attr-defined]
    if not cast:
        model.half()
        model.norm.float()
    optimizer = engine.wrap(
        INNERS[name](groups), mpcore.DynamicLossScale(2.0**8, growth_interval=2)
    )
    if cast:
        mpcore.cast_model(model, torch.float16, optimizer)
    return model, optimizer


def train(model: Model, optimizer: Any, seeds: Any) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if seed == 2:
                noise.view(-1)[0] = torch.inf
            losses.append((param.float() * noise).sum())
        optimizer.backward(torch.stack(losses).sum())
        optimizer.step()
        optimizer.zero_grad()


def create_state(model: Model, optimizer: Any) -> None:
    """What the message asks for: one step over gradients of zeros."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()


def section(optimizer: Any) -> Any:
    return optimizer.state_dict()["mpcore"]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "flattened", "full"])
@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_state_got_and_set_by_torch_goes_on_bit_for_bit(
    engine: Engine, name: str, options: StateDictOptions, named: bool
) -> None:
    model, optimizer = make(engine, name, named)
    train(model, optimizer, range(5))
    weights, state = get_state_dict(model, optimizer, options=options)
    other, resumed = make(engine, name, named)
    if name == "Adagrad":  # whose constructor makes the state that torch looks for
        create_state(other, resumed)
    set_state_dict(
        other, resumed, model_state_dict=weights, optim_state_dict=state, options=options
    )
    assert section(resumed) == section(optimizer)
    assert section(resumed)["loss_scale"]["skipped_steps"] == 1
    train(model, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    assert section(resumed) == section(optimizer)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", INNERS)
def test_a_checkpoint_on_disk_comes_back_bit_for_bit(name: str, flat: bool, tmp_path: Path) -> None:
    engine = Engine("cpu", "general")
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(engine, name, True)
    train(model, optimizer, range(5))
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    saved["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    other, resumed = make(engine, name, True)
    if name == "Adagrad":
        create_state(other, resumed)
    room = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    room["optimizer"] = get_optimizer_state_dict(other, resumed, options=options)
    dcp.load(room, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(room["model"])
    set_optimizer_state_dict(other, resumed, room["optimizer"], options=options)
    train(model, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    assert section(resumed) == section(optimizer)


def test_an_optimizer_is_stateful_by_itself(engine: Engine, tmp_path: Path) -> None:
    model, optimizer = make(engine, "AdamW", True)
    train(model, optimizer, range(5))
    dcp.save({"optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)
    other, resumed = make(engine, "AdamW", True)
    train(other, resumed, range(1))  # state to read into
    other.load_state_dict(model.state_dict())
    dcp.load({"optimizer": resumed}, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    assert section(resumed) == section(optimizer)


def test_masters_alone_are_not_taken_for_the_whole_state(engine: Engine) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make(engine, "AdamW", True, cast=True)
    train(model, optimizer, range(5))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed = make(engine, "AdamW", True, cast=True)
    before = snapshot(resumed)
    with pytest.raises(mpcore.ArgumentError, match=r"exp_avg.*got master alone.*zeros"):
        set_optimizer_state_dict(other, resumed, saved, options=options)
    assert same_bits(snapshot(resumed), before)
    create_state(other, resumed)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert same_bits(snapshot(resumed), snapshot(optimizer))
