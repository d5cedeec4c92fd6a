"""mpcore.GradScaler between runs: checkpoints in both directions, copies, a scale set by hand."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from torch import nn

THEIRS, OURS = torch.amp.GradScaler, mpcore.GradScaler
INF = float("inf")


def stepped(kind: Any, history: list[bool], **options: Any) -> Any:
    """A scaler after some steps of an optimizer of its own."""
    params = [nn.Parameter(torch.ones(2))]
    optimizer, scaler = torch.optim.SGD(params, lr=0.1), kind("cpu", **options)
    for bad in history:
        optimizer.zero_grad()
        scaler.scale(params[0].sum() * (INF if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler


@pytest.mark.parametrize(("source", "target"), [(OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)])
@pytest.mark.parametrize("started", [False, True])
def test_checkpoints_go_both_ways_and_the_course_goes_on(
    source: Any, target: Any, started: bool
) -> None:
    options = {"init_scale": 24.0, "growth_interval": 3}
    saved = stepped(source, [True, False, False], **options)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = stepped(target, [False] if started else [])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded.get_scale(), loaded._get_growth_tracker()) == (12.0, 2)
    params = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(params, lr=0.1)
    loaded.scale(params[0].sum()).backward()
    loaded.step(optimizer)
    loaded.update()
    assert (loaded.get_scale(), loaded._get_growth_tracker()) == (24.0, 0)


def test_bounds_hysteresis_and_counters_are_saved() -> None:
    saved = stepped(
        OURS, [True, False], min_scale=2.0, max_scale=2.0**20, hysteresis=3, refill="growth"
    )
    loaded = OURS("cpu")
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state_dict() == saved.state_dict()
    assert (loaded.steps, loaded.skipped_steps) == (2, 1)
    assert loaded.state_dict()["_overflows_left"] == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scale": float("nan")}, AssertionError),
        ({"growth_factor": float("nan")}, AssertionError),
        ({"backoff_factor": float("nan")}, AssertionError),
        ({"growth_interval": 1.5}, AssertionError),
        ({"_growth_tracker": 1.5}, AssertionError),
        ({"scale": "8"}, TypeError),
        # with a number beside it that would be taken after a warning
        ({"growth_factor": 0.5, "refill": "x"}, AssertionError),
        ({"min_scale": 4.0, "max_scale": 2.0}, AssertionError),
        ({"refill": "x"}, AssertionError),
        ({"hysteresis": 0}, AssertionError),
    ],
)
def test_a_bad_state_changes_nothing(changes: dict[str, Any], error: type[Exception]) -> None:
    scaler = stepped(OURS, [True, False])
    before = scaler.state_dict()
    with pytest.raises(error):
        scaler.load_state_dict({**before, **changes})
    for key in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"):
        with pytest.raises(KeyError, match=key):
            scaler.load_state_dict({k: v for k, v in before.items() if k != key})
    assert scaler.state_dict() == before


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 2.0**-126), (INF, 2.0**126), (3.0, 3.0)])
def test_a_broken_scale_of_torchs_is_brought_back(scale: float, expected: float) -> None:
    state = THEIRS("cpu").state_dict() | {"scale": scale}
    for scaler in (OURS("cpu"), stepped(OURS, [False])):
        if scale == expected:
            scaler.load_state_dict(state)
        else:
            with pytest.warns(UserWarning, match=r"^GradScaler: the scale \S+ is used as "):
                scaler.load_state_dict(state)
        assert scaler.get_scale() == expected


@pytest.mark.parametrize("started", [False, True])
def test_a_scale_that_never_moves_stays(started: bool) -> None:
    scaler = OURS.of(mpcore.StaticLossScale(64.0), "cpu")
    if started:
        scaler.scale(torch.ones(()))
    scaler.load_state_dict(THEIRS("cpu").state_dict())
    assert scaler.get_scale() == 64.0


@pytest.mark.parametrize("clone", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
@pytest.mark.parametrize("history", [[], [True, False]])
def test_copies_go_on_alike(clone: Any, history: list[bool]) -> None:
    scaler = stepped(OURS, history, hysteresis=2, min_scale=4.0)
    twin = clone(scaler)
    assert twin.state_dict() == scaler.state_dict()
    params = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(params, lr=0.1)
    twin.scale(params[0].sum() * INF).backward()
    twin.step(optimizer)
    twin.update()
    assert twin.last_step.skipped
    assert twin.skipped_steps == scaler.skipped_steps + 1


def test_update_sets_a_scale() -> None:
    scaler = stepped(OURS, [False, False], min_scale=2.0, max_scale=64.0, init_scale=8.0)
    for value, expected in ((16.0, 16.0), (4, 4.0), (torch.tensor([32.0]), 32.0)):
        scaler.update(value)
        assert scaler.get_scale() == expected
    assert scaler._get_growth_tracker() == 2  # as in torch
    for tensor, expected in ((0.0, 2.0), (INF, 64.0), (float("nan"), 2.0)):
        scaler.update(torch.tensor(tensor))
        assert scaler.get_scale() == expected
    for value, expected in ((1.0, 2.0), (128, 64.0), (-INF, 2.0)):
        with pytest.warns(UserWarning, match=r"the new_scale \S+ is used as .*bounds are 2 and 64"):
            scaler.update(value)
        assert scaler.get_scale() == expected
    with pytest.raises(AssertionError, match="The new_scale must be a number, got NaN"):
        scaler.update(float("nan"))
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("key", ["_overflows_left", "_steps", "_skipped_steps"])
@pytest.mark.parametrize("value", [-1, 2**63, 1.5, "x", None, True])
def test_a_bad_counter_changes_nothing(key: str, value: Any) -> None:
    scaler = stepped(OURS, [True, False])
    before = scaler.state_dict()
    with pytest.raises(AssertionError, match=f"The {key.strip('_').replace('_', ' ')} must be"):
        scaler.load_state_dict({**before, key: value})
    assert scaler.state_dict() == before


def test_integers_of_numpy_and_intervals_that_never_end_are_accepted() -> None:
    scaler = stepped(OURS, [False] * 3, growth_interval=np.int64(2), init_scale=4.0)
    assert scaler.get_scale() == 8.0
    for interval in (2**31, 2**62):
        scaler.set_growth_interval(interval)
        assert scaler.get_growth_interval() == interval
        again = OURS("cpu")
        again.load_state_dict(scaler.state_dict())
        assert again.get_growth_interval() == interval
    assert stepped(OURS, [False] * 3, growth_interval=2**40).get_scale() == 2.0**16
    off = OURS("cpu", enabled=False)
    off.set_growth_interval(0)  # torch asks nothing of a scaler that does nothing
    off.set_growth_factor(0.0)
    off.set_backoff_factor(2.0)
