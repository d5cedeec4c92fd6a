"""`optimizer.state`: what it shows, and what becomes of what somebody puts into it."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.blocks import make, train
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot


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


def by_entry(optimizer: Any) -> None:
    for state in optimizer.state.values():
        edit_entries(state)


def all_entries(optimizer: Any) -> None:
    for state in optimizer.state.values():
        edit_all(state)


def whole_states(optimizer: Any) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = new = dict(state)
        edit_entries(new)


def all_of_it(optimizer: Any) -> None:
    new = defaultdict(dict, {param: dict(state) for param, state in optimizer.state.items()})
    optimizer.state = new
    by_entry(optimizer)


@pytest.mark.parametrize("when", ["between steps", "before a group", "after unscaling"])
@pytest.mark.parametrize("edit", [by_entry, all_entries, whole_states, all_of_it])
def test_entries_put_into_the_state_are_what_the_next_step_uses(
    engine: Engine, edit: Any, when: str
) -> None:
    plain, other = make(engine), make(engine)

    def in_place(optimizer: Any) -> None:
        for state in optimizer.state.values():
            edit_in_place(state)

    for (model, optimizer), how in ((plain, in_place), (other, edit)):
        train(model, optimizer, [0, 1])
        if when == "after unscaling":
            optimizer.backward(model(torch.ones(2, 4).half()).square().mean())
            optimizer.unscale_()
        how(optimizer)
        if when == "before a group":
            late = nn.Parameter(torch.ones(2).half())
            optimizer.add_param_group({"params": [("late", late)]})
        if when == "after unscaling":
            optimizer.step()
            optimizer.zero_grad()
        train(model, optimizer, [3, 4])
    assert same_bits(snapshot(other[1]), snapshot(plain[1]))
    assert same_bits(other[1].state_dict(), plain[1].state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_knows_its_own_parameters_and_no_others(engine: Engine, way: Any) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, [0, 1])
    other, copied = way((model, optimizer))
    del model, optimizer
    doubled = {name: param.float() * 2 for name, param in other.named_parameters()}
    copied.sync_masters_from_model(doubled)
    assert torch.equal(copied.state[other.layers[0].weight]["master"], doubled["layers.0.weight"])
    # some of them get the identities of what was deleted
    late = [nn.Parameter(torch.ones(2).half()) for _ in range(200)]
    copied.add_param_group({"params": [(f"late{i}", p) for i, p in enumerate(late)]})
    copied.scale(torch.ones(()))
    for param in late:
        param.grad = torch.ones_like(param)
    copied.step()
    assert all("master" in copied.state[param] for param in late)


def test_a_write_after_the_clip_is_noticed_too(engine: Engine) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, [0, 1])
    optimizer.backward(model(torch.ones(2, 4).half()).square().mean())
    optimizer.clip_grad_norm_(1.0)
    with torch.no_grad():
        model.layers[0].weight.fill_(100.0)
    with pytest.warns(UserWarning, match=r"^\d+ elements of layers\.0\.weight were written to"):
        optimizer.step()
    assert (optimizer.state[model.layers[0].weight]["master"] > 99).all()


@pytest.mark.parametrize("edit", [by_entry, whole_states, all_of_it])
def test_a_step_with_a_closure_uses_them_too(engine: Engine, edit: Any) -> None:
    plain, other = make(engine), make(engine)

    def in_place(optimizer: Any) -> None:
        for state in optimizer.state.values():
            edit_in_place(state)

    for (model, optimizer), how in ((plain, in_place), (other, edit)):
        train(model, optimizer, [0, 1])
        how(optimizer)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4).half()).square().mean()
            optimizer.backward(loss)
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
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
    optimizer.state_dict()  # where masters that were taken out are shown again
    kept = [optimizer.state[p]["master"].detach() for p in model.layers.parameters()]
    assert same_bits(kept, masters)
    train(model, optimizer, [3])
    assert float(optimizer.state[model.layers[0].weight]["step"]) == 1.0
    for param, before in zip(model.layers.parameters(), masters, strict=True):
        moved = (optimizer.state[param]["master"] - before).abs().max()
        assert 0 < moved < 0.06  # a first step of Adam is as long as the learning rate


@pytest.mark.parametrize("entry", ["master", "exp_avg", "all"])
def test_what_is_put_into_the_state_before_a_clip_of_other_gradients_is_used(
    engine: Engine, entry: str
) -> None:
    """A clip plans for parameters that it knows and the last step did not have."""

    def trained(clips: bool) -> list[Any]:
        params = [nn.Parameter(torch.full((3,), 1.0 + k).half()) for k in range(2)]
        inner = torch.optim.AdamW(params, lr=2.0**-4, betas=(0.5, 0.5))
        optimizer = engine.wrap(inner, mpcore.StaticLossScale(2.0))

        def backward(some: list[Any]) -> None:
            optimizer.backward(torch.stack([p.float().square().sum() for p in some]).sum())

        backward(params)
        optimizer.accumulate()
        backward(params[:1])
        optimizer.step()  # over the sums of both, of which one has had a further pass
        optimizer.zero_grad()
        if entry == "all":
            del optimizer.state[params[0]]
        else:
            optimizer.state[params[0]][entry] = torch.full((3,), 0.5)
        backward(params[:1])
        if clips:
            optimizer.clip_grad_norm_(1e9)
        optimizer.step()
        return [optimizer.state[p]["master"].tolist() for p in params]

    assert trained(clips=True) == trained(clips=False)
