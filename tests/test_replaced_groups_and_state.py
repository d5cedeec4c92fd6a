"""Param groups and state that somebody replaces on the wrapped optimizer, or on the wrapper."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import StageError
from torch import nn

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALE = mpcore.DynamicLossScale(2.0**6)


class Twins:
    """A wrapped AdamW over parameters of three dtypes, and the same over float32 copies."""

    def __init__(self, engine: Engine) -> None:
        values = torch.linspace(-1, 1, 12).view(3, 4)
        self.engine = engine
        self.params = [nn.Parameter(value.to(d)) for value, d in zip(values, DTYPES, strict=True)]
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.optimizer: Any = engine.wrap(torch.optim.AdamW(self.params, lr=0.01), SCALE)
        self.plain: Any = torch.optim.AdamW(self.copies, lr=0.01)
        self.taken = 0

    def step(self) -> None:
        scale = float(self.optimizer.scale(torch.ones(())))
        for i, (param, other) in enumerate(zip(self.params, self.copies, strict=True)):
            grad = torch.arange(4.0) - i + 0.5 * self.taken
            param.grad = (grad * scale).to(param.dtype)
            other.grad = param.grad.float() / scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.plain.step()
        self.taken += 1
        for param, other in zip(self.params, self.copies, strict=True):
            master = self.optimizer.state[param].get("master", param).detach()
            assert self.engine.agree(master, other, steps=self.taken, lr=0.01)
            assert same_bits(param.detach(), rounded(master, param.dtype))


CALLS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: o.step(),
    "closure": lambda o: o.step(lambda: None),
    "clip": lambda o: o.clip_grad_norm_(1.0),
    "unscale": lambda o: o.unscale_(),
    "accumulate": lambda o: o.accumulate(),
    "state_dict": lambda o: o.state_dict(),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("replaced", ["inner", "wrapper"])
def test_another_list_of_groups_is_an_error_whose_advice_works(
    engine: Engine, replaced: str, call: str
) -> None:
    twins = Twins(engine)
    twins.step()
    optimizer = twins.optimizer
    before = snapshot(optimizer)
    optimizer.backward(sum(p.float().sum() for p in twins.params))
    owner = optimizer.inner if replaced == "inner" else optimizer
    owner.param_groups = copy.deepcopy(owner.param_groups)
    name = "optimizer.inner" if replaced == "inner" else "optimizer"
    with pytest.raises(StageError, match=rf"^param_groups: expected one list .* on {name}\. ") as e:
        CALLS[call](optimizer)
    remedy = str(e.value).split("Write ")[1].split(",")[0]
    exec(remedy, {"optimizer": optimizer})
    optimizer.zero_grad()
    assert same_bits(snapshot(optimizer), before)
    twins.step()


def test_other_lists_on_both_are_an_error(engine: Engine) -> None:
    twins = Twins(engine)
    groups = copy.deepcopy(twins.optimizer.param_groups)
    twins.optimizer.param_groups = twins.optimizer.inner.param_groups = groups
    with pytest.raises(StageError, match=r"on both\. Build both anew"):
        twins.step()


def test_a_state_that_is_emptied_on_the_inner_optimizer_starts_anew_as_in_torch(
    engine: Engine,
) -> None:
    twins = Twins(engine)
    for _ in range(3):
        twins.step()
    twins.optimizer.inner.state = defaultdict(dict)
    twins.plain.state = defaultdict(dict)
    shown = twins.optimizer.state_dict()["state"]
    assert [set(entry) for entry in shown.values()] == [{"master"}, {"master"}]
    for _ in range(3):
        twins.step()
    assert {float(twins.optimizer.state[p]["step"]) for p in twins.params} == {3.0}


@pytest.mark.parametrize("masters_too", [False, True])
def test_a_state_by_parameter_on_the_inner_optimizer_is_taken(
    engine: Engine, masters_too: bool
) -> None:
    twins = Twins(engine)
    for _ in range(2):
        twins.step()
    kept = {param: dict(twins.optimizer.state[param]) for param in twins.params}
    kept = copy.deepcopy(kept, {id(p): p for p in twins.params})
    others = copy.deepcopy(dict(twins.plain.state), {id(p): p for p in twins.copies})
    twins.step()
    twins.optimizer.inner.state = defaultdict(dict, kept)
    if not masters_too:
        for entry in kept.values():
            entry.pop("master", None)
    twins.plain.state = defaultdict(dict, others)
    for _ in range(3):
        twins.step()
    assert {float(twins.optimizer.state[p]["step"]) for p in twins.params} == {5.0}


@pytest.mark.parametrize("way", ["a clip", "an edit"])
def test_a_group_without_gradients_may_go_between_a_clip_and_the_next_look(
    engine: Engine, way: str
) -> None:
    def train(goes: bool) -> Any:
        params = [nn.Parameter(torch.ones(4).half()) for _ in range(2)]
        groups = [{"params": [param]} for param in params]
        optimizer = engine.wrap(torch.optim.AdamW(groups, lr=0.1), mpcore.NoLossScale())
        for number in range(3):
            params[1].grad = torch.arange(4.0).half()
            optimizer.clip_grad_norm_(1.0)
            if goes and number == 1:
                optimizer.state.pop(params[0], None)
                del optimizer.param_groups[0]
            if way == "a clip":
                optimizer.clip_grad_norm_(0.5)
            else:
                params[1].grad.mul_(2.0)
            optimizer.step()
        return dict(optimizer.state[params[1]])

    assert same_bits(train(True), train(False))
