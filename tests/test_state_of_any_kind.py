"""Optimizer state that is more than a dictionary of tensors, and checkpoints of older versions."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import mpcore
import pytest
import torch
from mpcore import migration
from mpcore.base.nested import map_tensors
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.blocks import make, train
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot

GENERALS = [engine for engine in ENGINES if not engine.fused]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Velocity(NamedTuple):
    value: Tensor
    count: int


class Nested(torch.optim.Optimizer):
    """Momentum, kept in a named tuple beside a dictionary in a list, and a number for all."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                old = state.get("v", Velocity(torch.zeros_like(param), 0))
                state["v"] = Velocity(old.value * 0.5 + param.grad, old.count + 1)
                state["more"] = [{"twice": (state["v"].value * 2, "text")}, None]
                param.sub_(group["lr"] * state["v"].value)
        return loss


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for dtype in DTYPES]


def run(params: Any, optimizer: Any, seeds: Any, how: str = "step") -> None:
    for seed in seeds:

        def closure(seed: int = seed) -> Tensor:
            noise = torch.randn(6, generator=torch.Generator().manual_seed(seed))
            loss = torch.stack([(p.float() * noise).sum() for p in params]).sum()
            optimizer.backward(loss * (torch.inf if seed == 1 else 1.0))
            return loss

        if how == "closure":
            optimizer.step(closure)
        else:
            closure()
            if how == "accumulate":
                optimizer.accumulate()
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("how", ["step", "closure", "accumulate"])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("engine", GENERALS, ids=str)
def test_nested_state_is_saved_loaded_and_copied_bit_for_bit(
    engine: Engine, way: str, how: str
) -> None:
    params = weights()
    optimizer = engine.wrap(Nested(params), mpcore.DynamicLossScale(2.0**8))
    run(params, optimizer, range(4), how)
    if way == "state_dict":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = engine.wrap(Nested(others), mpcore.DynamicLossScale(2.0**8))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    else:
        others, resumed = pickle.loads(pickle.dumps((params, optimizer)))
    run(params, optimizer, range(4, 7), how)
    run(others, resumed, range(4, 7), how)
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    velocity = resumed.state[others[0]]["v"]
    assert type(velocity).__name__ == "Velocity"
    assert (velocity.count, velocity.value.dtype) == (6, torch.float32)
    assert resumed.state["calls"] == resumed.inner.state["calls"] == 6


@pytest.mark.parametrize("engine", GENERALS, ids=str)
def test_nested_16_bit_state_of_an_optimizer_that_is_wrapped_late_is_widened(
    engine: Engine,
) -> None:
    params = weights()
    inner = Nested(params)
    for param in params:
        param.grad = torch.ones_like(param)
    inner.step()
    optimizer = engine.wrap(inner, mpcore.NoLossScale())
    optimizer.step()
    velocity = optimizer.state[params[0]]["v"]
    assert (velocity.value.dtype, velocity.count) == (torch.float32, 2)


def test_a_plain_value_in_the_state_stays_and_is_saved(engine: Engine) -> None:
    model, optimizer = make(engine)
    optimizer.state["note"] = 1
    train(model, optimizer, [0, 1])
    assert optimizer.inner.state["note"] == 1
    other, resumed = make(engine)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state["note"] == 1
    train(model, optimizer, [3, 4])
    train(other, resumed, [3, 4])
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    del resumed.state["note"]
    train(other, resumed, [5])
    assert "note" not in resumed.inner.state
    assert migration.to_torch(optimizer)["state"]["note"] == 1
    plain = migration.from_torch(optimizer, migration.to_torch(optimizer))
    assert plain["state"]["note"] == 1


def test_containers_keep_their_types() -> None:
    value = defaultdict(list, {"a": OrderedDict(b=Velocity(torch.ones(1), 2)), "c": ({1}, [None])})
    changed = map_tensors(value, lambda tensor: tensor * 3)
    assert type(changed) is defaultdict
    assert changed["new"] == []
    assert type(changed["a"]) is OrderedDict
    assert changed["a"]["b"].value.item() == 3.0
    assert changed["c"] == value["c"]
    assert changed["c"][0] is not value["c"][0]
    assert value["a"]["b"].value.item() == 1.0


OLDER = ["maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad"]


@pytest.mark.parametrize("option", [*OLDER, "decoupled_weight_decay"])
def test_an_option_that_an_older_torch_did_not_save_is_filled_in(
    engine: Engine, option: str
) -> None:
    model, optimizer = make(engine)
    if option not in optimizer.param_groups[0]:
        pytest.skip("this torch has no such option")
    train(model, optimizer, [0, 1])
    saved = copy.deepcopy(optimizer.state_dict())
    other, resumed = make(engine)
    other.load_state_dict(model.state_dict())
    del saved["param_groups"][0][option]
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0][option] == optimizer.param_groups[0][option]
    train(model, optimizer, [3, 4])
    train(other, resumed, [3, 4])
    assert same_bits(snapshot(resumed), snapshot(optimizer))


def test_an_option_that_nobody_fills_in_is_an_error_and_changes_nothing(engine: Engine) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, [0])
    saved, before = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer)
    del saved["param_groups"][0]["lr"]
    with pytest.raises(mpcore.ArgumentError, match="expected the option 'lr'"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(optimizer), before)


STEPPED = ("Adadelta", "Adafactor", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "AdamW")


@pytest.mark.parametrize("name", [*STEPPED, "Adagrad"])
@pytest.mark.parametrize("engine", GENERALS, ids=str)
def test_a_step_count_that_was_saved_as_a_number_is_one_again(engine: Engine, name: str) -> None:
    runs = []
    for plain in (False, True):
        param = nn.Parameter(torch.ones(2, 3).half())
        optimizer = engine.wrap(getattr(torch.optim, name)([param], lr=0.1), mpcore.NoLossScale())
        param.grad = torch.ones_like(param)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        if plain:
            saved["state"][0]["step"] = int(saved["state"][0]["step"])
        optimizer.load_state_dict(saved)
        param.grad = torch.ones_like(param)
        optimizer.step()
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


class Event:
    """What a CUDA event does when somebody copies it."""

    def __reduce__(self) -> Any:
        raise TypeError("an event cannot be pickled")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_an_optimizer_whose_alarm_waits_for_its_device_can_be_copied(
    engine: Engine, way: Any
) -> None:
    model, optimizer = make(engine)
    optimizer.add_loss("other", mpcore.StaticLossScale(4.0))
    optimizer._losses._alarm._sent = Event()
    train(model, optimizer, [0])
    other, copied = way((model, optimizer))
    train(model, optimizer, [1])
    train(other, copied, [1])
    assert same_bits(snapshot(copied), snapshot(optimizer))
    assert copied._losses._alarm._sent is None


def test_a_plain_state_is_refused_and_the_way_in_is_named(engine: Engine) -> None:
    model, optimizer = make(engine)
    train(model, optimizer, [0])
    before = snapshot(optimizer)
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(mpcore.ArgumentError, match=r"mpcore\.migration\.from_torch"):
        optimizer.load_state_dict(plain.state_dict())
    assert same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("what", ["parameters", "names"])
def test_values_that_change_their_keys_are_what_the_next_step_uses(
    engine: Engine, what: str
) -> None:
    runs = []
    for moved in (False, True):
        params = [nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0)]
        optimizer = engine.wrap(torch.optim.Adam(params, lr=0.1), mpcore.NoLossScale())
        for _ in range(2):
            for param, grad in zip(params, (1.0, -3.0), strict=True):
                param.grad = torch.full((3,), grad)
            optimizer.step()
        shown = [dict(optimizer.state[param]) for param in params]
        names = ("exp_avg", "exp_avg_sq")
        if what == "names":
            pairs = [(s["exp_avg"], s["exp_avg_sq"]) for s in shown]
            pairs += [(s["exp_avg_sq"], s["exp_avg"].abs()) for s in shown]
        else:
            pairs = [(a[n], b[n]) for a, b in [shown, shown[::-1]] for n in names]
        if not moved:
            values = [(to, value.clone()) for to, value in pairs]
            for to, value in values:
                to.copy_(value)
        elif what == "names":
            for param, state in zip(params, shown, strict=True):
                state["exp_avg"].abs_()  # it becomes a second moment
                exchanged = dict(zip(names, names[::-1], strict=True))
                optimizer.state[param] = {exchanged.get(k, k): v for k, v in state.items()}
        else:
            optimizer.state.clear()
            optimizer.state.update(zip(params[::-1], shown, strict=True))
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
        runs.append([param.detach().clone() for param in params])
    assert same_bits(*runs)
