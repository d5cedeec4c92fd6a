"""Damaged checkpoints, and ones of another order: they load exactly, or are refused untouched."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.checkpoint import file as checkpoint_file
from mpcore.loss_scale import LossScaleState
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine, engine_cases
from mpcore_testing.snapshots import snapshot

INNERS: dict[str, Any] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
}
FUSED = Engine("compiled", "fused")
NAMES = ("low", "brain", "full")


def model_of(seed: int) -> nn.Module:
    generator, model = torch.Generator().manual_seed(seed), nn.Module()
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for name, dtype in zip(NAMES, dtypes, strict=True):
        value = torch.randn(2, 3, generator=generator).to(dtype)
        setattr(model, name, nn.Parameter(value))
    return model


def optimizer_of(
    engine: Engine, model: nn.Module, kind: str = "AdamW", groups: Any = (NAMES[:2], NAMES[2:])
) -> Any:
    named = dict(model.named_parameters())
    wanted = [{"params": [(name, named[name]) for name in group]} for group in groups]
    return engine.wrap(INNERS[kind](wanted), mpcore.DynamicLossScale(2.0**6))


def train(model: nn.Module, optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scale = float(optimizer.scale(torch.ones(())))
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.grad = (noise * scale).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def trained(engine: Engine, kind: str = "AdamW") -> tuple[nn.Module, Any]:
    model = model_of(0)
    optimizer = optimizer_of(engine, model, kind)
    train(model, optimizer, 1, 2)
    return model, optimizer


@pytest.mark.parametrize(("kind", "engine"), engine_cases(INNERS))
@pytest.mark.parametrize(
    "groups",
    [(("full", "low"), ("brain",)), (("brain", "full", "low"),), tuple((n,) for n in NAMES)],
)
def test_named_parameters_are_matched_in_any_order_and_groups(
    engine: Engine, kind: str, groups: Any
) -> None:
    model, optimizer = trained(engine, kind)
    other = model_of(9)
    reordered = optimizer_of(engine, other, kind, groups)
    reordered.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 3, 4)
    train(other, reordered, 3, 4)
    for name in NAMES:
        one, two = getattr(model, name), getattr(other, name)
        assert same_bits(one.detach(), two.detach())
        assert same_bits(dict(optimizer.state[one]), dict(reordered.state[two]))
    assert [group["param_names"] for group in reordered.param_groups] == list(map(list, groups))


def test_options_come_from_the_group_that_a_parameter_was_in() -> None:
    _, optimizer = trained(FUSED)
    for group, lr in zip(optimizer.param_groups, (0.25, 0.5), strict=True):
        group["lr"] = lr
    reordered = optimizer_of(FUSED, model_of(9), groups=(("full",), ("low",), ("brain",)))
    reordered.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in reordered.param_groups] == [0.5, 0.25, 0.25]


def test_names_that_are_missing_or_foreign_are_named() -> None:
    _, optimizer = trained(FUSED)
    saved = copy.deepcopy(optimizer.state_dict())  # it shares lists with the optimizer
    saved["param_groups"][0]["param_names"][1] = "other"
    before = snapshot(optimizer)
    with pytest.raises(mpcore.ArgumentError, match=r"got none for \['brain'\] and unknown"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(optimizer), before)


VALUES: list[Any] = [
    *(None, "x", -1, 2.5, True, [], {}, float("nan"), 2**70),
    *(torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3).half(), torch.ones(2, 3).int()),
    *(torch.ones(()), torch.zeros(0), (0.5, 0.5)),
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into nested dictionaries and lists."""
    items = list(tree.items()) if isinstance(tree, dict) else []
    items += list(enumerate(tree)) if isinstance(tree, list) else []
    found = [(*path, key) for key, _ in items]
    return found + [deeper for key, value in items for deeper in places(value, (*path, key))]


def damage(saved: Any, number: int) -> None:
    """Drops, renames or replaces something, chosen by `number`."""
    choose = random.Random(number)
    *path, key = choose.choice(places(saved))
    for step in path:
        saved = saved[step]
    what = choose.choice(["drop", "rename", "replace", "replace", "replace"])
    if what == "drop":
        del saved[key]
    elif what == "rename" and isinstance(saved, dict):
        saved[choose.choice(["x", 17, "exp_avg", "lr"])] = saved.pop(key)
    else:
        saved[key] = copy.deepcopy(choose.choice(VALUES))


#: what torch's AdamW and SGD take an option for that an older version did not save
FILLED_IN = {
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable", "nesterov"), False),
    "foreach": None,
}


def loaded_exactly(optimizer: Any, saved: Any) -> bool:
    now, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(saved)
    first = next(
        g["mpcore"] for g in (saved, *saved["param_groups"]) if g.get("mpcore") is not None
    )
    # what files from before its time lack
    numbers = {**LossScaleState._field_defaults, **first["loss_scale"]}
    hysteresis = optimizer.loss_scaling.hysteresis
    numbers["overflows_left"] = min(numbers["overflows_left"], hysteresis)  # settings win
    numbers["peak"] = numbers["peak_before"] = 0.0  # of another kind of scale
    sums = first.pop("accumulated", None)
    assert same_bits(now["mpcore"].pop("accumulated", None), sums)
    for group in (now, *now["param_groups"]):
        assert group["mpcore"] == {**first, "loss_scale": numbers}
    for group in (*now["param_groups"], *saved["param_groups"]):
        group.pop("mpcore", None)  # copies, for when the first one is gone
    for group, own in zip(saved["param_groups"], now["param_groups"], strict=True):
        if "param_names" not in group:  # matched by position
            del own["param_names"]
        filled = {k: v for k, v in FILLED_IN.items() if k in own}
        filled["fused"] = False if "nesterov" in own else None
        group.update({**filled, **group})
        if "decoupled_weight_decay" in own:  # AdamW's, whatever was saved
            group["decoupled_weight_decay"] = True
    states = {index: state for index, state in saved["state"].items() if state}
    if "betas" in saved["param_groups"][0]:  # AdamW makes tensors of step counts
        for state in states.values():
            if isinstance(state.get("step"), (int, float)):
                state["step"] = torch.tensor(float(state["step"]))
    return same_bits(now["state"], states) and same_bits(now["param_groups"], saved["param_groups"])


def refused(optimizer: Any, saved: Any) -> str | None:
    """The message of an error of ours, None if the state was loaded."""
    try:
        optimizer.load_state_dict(saved)
    except mpcore.MpcoreError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@given(number=st.integers(0, 2**64), begun=st.booleans())
def test_a_damaged_state_loads_exactly_or_is_refused_and_changes_nothing(
    kind: str, number: int, begun: bool
) -> None:
    model, optimizer = trained(FUSED, kind)
    if begun:  # a step, which has sums then
        optimizer.backward(sum(p.float().sum() for p in model.parameters()))
        optimizer.accumulate()
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved, number)
    target_model = model_of(5)
    target = optimizer_of(FUSED, target_model, kind)
    train(target_model, target, 7)
    before = copy.deepcopy([snapshot(target), target.state_dict()])
    refusal = refused(target, saved)
    if refusal is None:
        assert loaded_exactly(target, saved)
    else:
        assert refusal.startswith("state_dict")
        assert same_bits([snapshot(target), target.state_dict()], before)
        train(target_model, target, 8)


@pytest.mark.parametrize("number", range(250))
def test_a_damaged_file_is_refused_or_holds_what_was_saved(number: int, tmp_path: Path) -> None:
    _, optimizer = trained(FUSED)
    path = tmp_path / "last.pt"
    checkpoint_file.save(optimizer.state_dict(), path)
    data, choose = bytearray(path.read_bytes()), random.Random(number)
    if number % 2:
        del data[choose.randrange(len(data)) :]
    else:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    path.write_bytes(data)
    target_model = model_of(5)
    target = optimizer_of(FUSED, target_model)
    before = copy.deepcopy([snapshot(target), target.state_dict()])
    try:
        saved = checkpoint_file.load(path)
        target.load_state_dict(saved)
    except mpcore.MpcoreError:
        assert same_bits([snapshot(target), target.state_dict()], before)
    else:
        assert loaded_exactly(target, optimizer.state_dict())


def test_a_file_is_replaced_whole_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for number in (1, 2):
        checkpoint_file.save({"number": number}, path)
        assert checkpoint_file.load(path) == {"number": number}
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint_file.save({"number": lambda: 3}, path)
    assert checkpoint_file.load(path) == {"number": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(FileNotFoundError):
        checkpoint_file.load(tmp_path / "none.pt")
