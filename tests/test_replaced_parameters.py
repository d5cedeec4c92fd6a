"""Parameters that are pruned, grown and replaced in training; the user moves their state."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.snapshots import snapshot

INNERS: dict[str, Any] = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
}
SIXTEEN = [torch.float16, torch.bfloat16]


def grown(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.zeros(4, 3, dtype=tensor.dtype)])


def pruned(tensor: Tensor) -> Tensor:
    return tensor[::2].clone()


class Points:
    """Points in one group and a frame in another, under an optimizer: a wrapped one or torch's."""

    def __init__(self, build: Any, wrap: Any, dtype: torch.dtype) -> None:
        values = torch.linspace(-1, 1, 18).view(6, 3).to(torch.bfloat16).to(torch.float16)
        self.frame = nn.Parameter(values[:2].to(dtype, copy=True))
        points = nn.Parameter(values.to(dtype, copy=True))
        groups = [{"params": [points], "name": "points"}, {"params": [self.frame], "lr": 0.02}]
        self.optimizer: Any = wrap(build(groups))

    @property
    def points(self) -> Any:
        return self.optimizer.param_groups[0]["params"][0]

    def step(self, number: int, scale: float = 1.0) -> None:
        for param in (self.points, self.frame):
            values = torch.arange(param.numel()).view(param.shape) % 7 - number % 5
            param.grad = (values * scale).to(param.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def change(self, change: Callable[[Tensor], Tensor], master: bool = True) -> None:
        """What densification does: a new parameter, and the old one's state under it."""
        old = self.points
        state = self.optimizer.state.pop(old)
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == old.shape:
                state[key] = change(value)
        if not master:
            del state["master"]
        self.optimizer.param_groups[0]["params"][0] = nn.Parameter(change(old.detach()))
        self.optimizer.state[self.points] = state


def wrapped(engine: Engine, name: str = "Adam", dtype: torch.dtype = torch.float16) -> Points:
    return Points(INNERS[name], lambda inner: engine.wrap(inner, mpcore.NoLossScale()), dtype)


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_points_that_come_and_go_train_as_in_float32(
    engine: Engine, name: str, dtype: torch.dtype
) -> None:
    ours = wrapped(engine, name, dtype)
    plain = Points(INNERS[name], lambda inner: inner, torch.float32)
    for number in range(12):
        for one in (ours, plain):
            one.step(number)
            if number in (2, 8):
                one.change(grown)
            if number in (3, 5):
                one.change(pruned)
    for param, other in ((ours.points, plain.points), (ours.frame, plain.frame)):
        master = ours.optimizer.state[param]["master"]
        assert master.shape == param.shape
        assert engine.agree(master, other, steps=12, lr=0.02)
        assert same_bits(param.detach(), rounded(master.detach(), dtype))
    assert len(ours.optimizer.state) == 2


def test_without_a_master_it_begins_from_the_weight_and_moments_stay(engine: Engine) -> None:
    points = wrapped(engine)
    points.step(0)
    points.step(1)
    points.change(grown, master=False)
    weight = points.points.detach().float()
    moment = points.optimizer.state[points.points]["exp_avg"].clone()
    for param in (points.points, points.frame):
        param.grad = torch.zeros_like(param)
    points.optimizer.param_groups[0]["lr"] = 0.0
    points.optimizer.step()
    state = points.optimizer.state[points.points]
    assert same_bits(state["master"].detach(), weight)
    assert torch.allclose(state["exp_avg"], moment * 0.9, rtol=2.0**-22)
    assert state["step"] == 3


@pytest.mark.parametrize("moved", [True, False])
def test_what_was_replaced_is_saved_loaded_and_goes_on(engine: Engine, moved: bool) -> None:
    points = wrapped(engine)
    points.step(0)
    if moved:
        points.change(pruned)
    else:  # a new one without a state
        del points.optimizer.state[points.points]
        points.optimizer.param_groups[0]["params"][0] = nn.Parameter(pruned(points.points.detach()))
    points.step(1)
    saved = copy.deepcopy(points.optimizer.state_dict())
    other = wrapped(engine)
    with torch.no_grad():
        other.optimizer.param_groups[0]["params"][0] = nn.Parameter(points.points.detach().clone())
        other.frame.copy_(points.frame)
    other.optimizer.load_state_dict(saved)
    for one in (points, other):
        one.step(2)
    assert same_bits(snapshot(other.optimizer), snapshot(points.optimizer))


def test_the_master_of_a_parameter_that_left_is_let_go(engine: Engine) -> None:
    points = wrapped(engine)
    points.step(0)
    old = weakref.ref(points.optimizer.state[points.points]["master"])
    points.change(grown)
    points.step(1)
    gc.collect()
    assert old() is None


def test_a_state_that_was_left_behind_is_named_when_it_would_be_saved(engine: Engine) -> None:
    points = wrapped(engine)
    points.step(0)
    old = points.points
    points.optimizer.param_groups[0]["params"][0] = nn.Parameter(grown(old.detach()))
    points.step(1)
    with pytest.raises(mpcore.StageError, match=r"^state_dict\(\): .* of shape \[6, 3\] in none"):
        points.optimizer.state_dict()
    del points.optimizer.state[old]
    assert len(points.optimizer.state_dict()["state"]) == 2


def test_an_edit_is_told_of_the_right_parameter_after_another_left(engine: Engine) -> None:
    points = wrapped(engine)
    points.step(0)
    points.change(pruned)
    points.step(1)
    with torch.no_grad():
        points.frame.fill_(0.5)
    with pytest.warns(UserWarning, match=r"^6 elements of group 1, parameter 0, \[2, 3\] were"):
        points.step(2)


def test_a_write_is_seen_after_another_parameter_left(engine: Engine) -> None:
    points = wrapped(engine)
    points.step(0)
    with torch.no_grad():
        points.points.mul_(1.0)  # one write more than the frame has had
    points.step(1)
    del points.optimizer.state[points.points], points.optimizer.param_groups[0]
    with torch.no_grad():
        points.frame.fill_(0.5)  # now it has had as many
    points.frame.grad = torch.zeros_like(points.frame)
    with pytest.warns(UserWarning, match=r"^6 elements of group 0, parameter 0, \[2, 3\] were"):
        points.optimizer.step()


def test_a_weight_that_differs_from_the_master_that_was_moved_is_an_edit(engine: Engine) -> None:
    points = wrapped(engine)
    points.step(0)
    points.change(pruned)
    with torch.no_grad():
        points.points[1] += 1
    expected = points.optimizer.state[points.points]["master"].clone()
    expected[1] = points.points[1].detach().float()
    points.points.grad = torch.zeros_like(points.points)
    points.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"^3 elements of group 0, parameter 0, \[3, 3\] were"):
        points.optimizer.step()
    assert same_bits(points.optimizer.state[points.points]["master"].detach(), expected)


def test_a_master_of_another_shape_is_not_taken(engine: Engine) -> None:
    points = Points(
        lambda groups: torch.optim.SGD(groups, lr=0.5),
        lambda inner: engine.wrap(inner, mpcore.NoLossScale()),
        torch.float16,
    )
    points.step(0)
    state = points.optimizer.state.pop(points.points)
    new = nn.Parameter(grown(points.points.detach()))
    points.optimizer.param_groups[0]["params"][0] = new
    points.optimizer.state[new] = state
    new.grad = torch.ones_like(new)
    expected = new.detach().float() - 0.5
    points.optimizer.step()
    assert same_bits(points.optimizer.state[new]["master"].detach(), expected)


def cut(tensor: Tensor) -> Tensor:
    """Where it lies: the address stays."""
    return tensor[:3]


@pytest.mark.parametrize("way", ["step", "unscale_", "clip"])
@pytest.mark.parametrize("change", [grown, cut])
def test_data_of_another_size_is_refused_and_nothing_changes(
    engine: Engine, way: str, change: Callable[[Tensor], Tensor]
) -> None:
    points = wrapped(engine)
    points.step(0)
    points.step(0)
    old = points.points.data
    before = copy.deepcopy(points.optimizer.state_dict())
    points.points.data = change(old)
    calls = {
        "step": points.optimizer.step,
        "unscale_": points.optimizer.unscale_,
        "clip": lambda: points.optimizer.clip_grad_norm_(1.0),
    }
    for param in (points.points, points.frame):
        param.grad = torch.ones_like(param)
    with pytest.raises(mpcore.ArgumentError, match=r"expected \[6, 3\] like its master, got \["):
        calls[way]()
    points.points.data = old
    points.optimizer.zero_grad()
    assert same_bits(points.optimizer.state_dict(), before)
    points.step(1)


def test_a_moment_of_another_shape_is_refused_where_kernels_would_read_behind_it(
    engine: Engine,
) -> None:
    points = wrapped(engine)
    points.step(0)
    state = points.optimizer.state[points.points]
    state["exp_avg_sq"] = pruned(state["exp_avg_sq"])
    master = state["master"].clone()
    error = mpcore.ArgumentError if engine.fused else RuntimeError
    with pytest.raises(error, match=r"exp_avg_sq|size"):
        points.step(1)
    if engine.fused:
        assert same_bits(points.optimizer.state[points.points]["master"], master)


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
def test_groups_in_another_order_train_on(engine: Engine, dtype: torch.dtype) -> None:
    turned, straight = wrapped(engine, dtype=dtype), wrapped(engine, dtype=dtype)
    for one in (turned, straight):
        one.step(0)
    points = turned.points
    turned.optimizer.param_groups.reverse()
    for number in (1, 2):
        straight.step(number)
        for param in (points, turned.frame):
            values = torch.arange(param.numel()).view(param.shape) % 7 - number % 5
            param.grad = values.to(param.dtype)
        turned.optimizer.step()
    for param, other in ((points, straight.points), (turned.frame, straight.frame)):
        assert same_bits(param.detach(), other.detach())
        ours, theirs = turned.optimizer.state[param], straight.optimizer.state[other]
        assert same_bits(dict(ours), dict(theirs))
