"""A checkpoint, a copy or a pickle taken within a step has what `accumulate` added up so far."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def make(engine: Engine) -> tuple[list[nn.Parameter], mpcore.MixedPrecisionOptimizer]:
    params = [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).to(d)) for d in DTYPES]
    names = [(f"p{i}", param) for i, param in enumerate(params)]
    scale = mpcore.HeadroomLossScale(2.0**6, window=4)
    optimizer = engine.wrap(torch.optim.AdamW(names, lr=0.1), scale)
    optimizer.add_loss("other", mpcore.DynamicLossScale(2.0**5))
    return params, optimizer


def add(params: Any, optimizer: Any, seed: int, *, bad: int | None = None, other: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=generator) for p in params]
    if bad is not None:
        noise[bad][1, 2] = torch.inf
    loss = torch.stack([(p.float() * n).sum() for p, n in zip(params, noise, strict=True)]).sum()
    if other:
        optimizer.losses["other"].backward(loss)
    else:
        optimizer.backward(loss)
        optimizer.accumulate()


def by_state_dict(engine: Engine, params: Any, optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    others, resumed = make(engine)
    with torch.no_grad():
        for param, weight in zip(others, weights, strict=True):
            param.copy_(weight)
    resumed.load_state_dict(state)
    return others, resumed


def by_deepcopy(engine: Engine, params: Any, optimizer: Any) -> Any:
    return copy.deepcopy((params, optimizer))


def by_pickle(engine: Engine, params: Any, optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps((params, optimizer)))


WAYS: list[Callable[..., Any]] = [by_state_dict, by_deepcopy, by_pickle]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [None, 0, 2])
@pytest.mark.parametrize("bad_is_other", [False, True])
def test_what_was_added_up_is_carried_along_with_its_overflows(
    engine: Engine, way: Any, bad: int | None, bad_is_other: bool
) -> None:
    params, optimizer = make(engine)
    add(params, optimizer, 1, other=False)  # so that there is a state
    optimizer.step()
    add(params, optimizer, 2, other=False, bad=None if bad_is_other else bad)
    add(params, optimizer, 3, other=True, bad=bad if bad_is_other else None)
    others, resumed = way(engine, params, optimizer)
    for some, its in ((params, optimizer), (others, resumed)):
        add(some, its, 4, other=False)
        its.clip_grad_norm_(1.0)
        its.step()
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    assert same_bits(resumed.state_dict(), optimizer.state_dict())
    assert resumed.last_step.skipped == (bad is not None)
    expected = optimizer.last_step.overflowed_in()
    assert resumed.last_step.overflowed_in() == expected
    assert [(o.micro_batch, o.loss, o.parameters) for o in expected] == (
        [] if bad is None else [(int(bad_is_other), "other" if bad_is_other else "", (f"p{bad}",))]
    )


def test_a_copy_shares_no_sum(engine: Engine) -> None:
    params, optimizer = make(engine)
    add(params, optimizer, 1, other=False)
    before = snapshot(optimizer)
    for way in WAYS:
        others, copied = way(engine, params, optimizer)
        add(others, copied, 2, other=False)
        copied.step()
        assert not same_bits(snapshot(copied), before)
    again, straight = make(engine)
    for some, its in ((params, optimizer), (again, straight)):
        if its is straight:
            add(some, its, 1, other=False)
        its.step()
    assert same_bits(snapshot(optimizer), snapshot(straight))


def test_a_step_that_has_not_begun_saves_nothing(engine: Engine) -> None:
    params, optimizer = make(engine)
    assert "accumulated" not in optimizer.state_dict()["mpcore"]
    add(params, optimizer, 1, other=False)
    assert "accumulated" in optimizer.state_dict()["mpcore"]
    optimizer.zero_grad()
    assert "accumulated" not in optimizer.state_dict()["mpcore"]


def broken(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    def change(section: Any) -> None:
        *above, last = path
        for key in above:
            section = section[key]
        section[last] = value

    return change


BROKEN = {
    "not a section": (lambda s: None, "accumulated"),
    "a sum of another shape": (broken(("sums", 0), torch.zeros(3)), "sums"),
    "a sum of another dtype": (broken(("sums", 1), torch.zeros(2, 3).half()), "sums"),
    "a foreign parameter": (broken(("sums", 7), torch.zeros(2, 3)), "sums"),
    "no micro-batch": (broken(("micro_batches",), []), "micro-batches"),
    "a foreign loss": (broken(("micro_batches", 0, "loss"), "nobody"), "loss"),
    "a negative size": (broken(("micro_batches", 0, "largest"), -1.0), "largest"),
    "a flag too few": (broken(("micro_batches", 0, "flags"), [0]), "params"),
    "a flag that is none": (broken(("micro_batches", 0, "flags"), [0, 0.5, 0]), "flags"),
    "a parameter that is none": (broken(("micro_batches", 0, "params"), [0, 1, 9]), "params"),
    "a micro-batch of others": (broken(("micro_batches", 0, "params"), [0, 1, 1]), "sums"),
    "a key too many": (broken(("micro_batches", 0, "more"), 1), "micro_batches"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_sums_that_do_not_fit_are_refused_and_nothing_changes(engine: Engine, name: str) -> None:
    params, optimizer = make(engine)
    add(params, optimizer, 1, other=False)
    state = copy.deepcopy(optimizer.state_dict())
    change, message = BROKEN[name]
    if name == "not a section":
        state["mpcore"]["accumulated"] = [1, 2]
    else:
        change(state["mpcore"]["accumulated"])
    others, target = make(engine)
    add(others, target, 2, other=False)
    before = snapshot(target), target.state_dict()
    with pytest.raises(mpcore.ArgumentError, match=message):
        target.load_state_dict(state)
    assert same_bits((snapshot(target), target.state_dict()), before)
