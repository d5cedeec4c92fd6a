"""What is saved of split masters is float32, and any optimizer loads it; or as it lies."""

import copy

import mpcore
import pytest
import torch
from mpcore import migration

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import PACKING, Engine
from mpcore_testing.stored import Stored, assert_same_states, bytes_of, stored

ENGINES = pytest.mark.parametrize("engine", PACKING, ids=str)
HALVES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)
STORES = ("float32", "split")


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


def trained(engine, dtype, masters, steps=3):
    one = stored(engine, adamw, dtype, masters=masters)
    for seed in range(steps):
        one.step(seed)
    return one


def load(one, saved, weights, *, weights_first=False):
    saved = copy.deepcopy(saved)
    if not weights_first:
        one.optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, weight in zip(one.params, weights, strict=True):
            param.copy_(weight)
    if weights_first:
        one.optimizer.load_state_dict(saved)


@HALVES
@ENGINES
@pytest.mark.parametrize("source", STORES)
@pytest.mark.parametrize("target", STORES)
def test_states_go_from_any_store_to_any_other(source, target, engine, dtype):
    first = trained(engine, dtype, source)
    saved = first.optimizer.state_dict()
    assert set(saved["state"][0]) == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert {value.dtype for value in saved["state"][0].values()} == {torch.float32}
    second = stored(engine, adamw, dtype, masters=target)
    second.step(9)
    load(second, saved, first.params)
    assert same_bits(second.optimizer.state_dict()["state"], saved["state"])
    for one in (first, second):
        for seed in (5, 6):
            one.step(seed)
    assert_same_states(first, second)
    assert second.optimizer.check_masters() == []


@HALVES
@ENGINES
@pytest.mark.parametrize("weights_first", [True, False])
def test_a_compact_state_is_what_lies_in_memory(weights_first, engine, dtype):
    first = trained(engine, dtype, "split")
    saved = first.optimizer.state_dict(compact=True)
    assert set(saved["state"][0]) == {"remainder", "step", "exp_avg", "exp_avg_sq"}
    assert saved["state"][0]["remainder"] is first.optimizer.state[first.params[0]]["remainder"]
    second = stored(engine, adamw, dtype, masters="split")
    second.step(9)
    load(second, saved, first.params, weights_first=weights_first)
    assert_same_states(first, second)
    for one in (first, second):
        one.step(5)
    assert_same_states(first, second)
    again = first.optimizer.state_dict()
    assert "master" in again["state"][0]  # a compact one was asked for once


def test_a_compact_state_has_half_the_bytes_of_masters():
    one = trained(Engine("compiled", "general"), torch.bfloat16, "split")
    sizes = [
        bytes_of([next(iter(saved["state"][0].values()))])
        for saved in (one.optimizer.state_dict(), one.optimizer.state_dict(compact=True))
    ]
    assert sizes == [15 * 4, 15 * 2]


def test_a_compact_state_is_refused_by_another_store_and_nothing_has_changed():
    engine = Engine("compiled", "general")
    saved = trained(engine, torch.bfloat16, "split").optimizer.state_dict(compact=True)
    other = trained(engine, torch.bfloat16, "float32")
    before = other.bits()
    with pytest.raises(mpcore.ArgumentError, match=r"got 'remainder' of a state_dict\(compact=Tr"):
        other.optimizer.load_state_dict(saved)
    assert same_bits(other.bits(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(remainder=state["remainder"].short()[:1]), r"shape \[3, 5\]"),
        (lambda state: state.update(remainder=state["remainder"].float()), "torch.int16"),
        (lambda state: state.update(master=torch.zeros(3, 5)), "expected one of"),
    ],
)
def test_a_broken_compact_state_is_refused(change, message):
    one = trained(Engine("reference", "general"), torch.float16, "split")
    saved = copy.deepcopy(one.optimizer.state_dict(compact=True))
    change(saved["state"][0])
    before = one.bits()
    with pytest.raises(mpcore.ArgumentError, match=message):
        one.optimizer.load_state_dict(saved)
    assert same_bits(one.bits(), before)


@ENGINES
@pytest.mark.parametrize("target", STORES)
@pytest.mark.parametrize("rule", ["adopt", "always"])
def test_a_weight_fits_its_master_as_either_store_rounds_ties(rule, target, engine):
    """1 + 2^-8 lies between two bfloat16 numbers: one store rounds it down, the other one up."""
    tie = torch.tensor([1 + 2.0**-8, -1 - 2.0**-8, 1.5])
    rounded = {"split": [1.0078125, -1.0078125, 1.5], "float32": [1.0, -1.0, 1.5]}

    def wrapped(masters, values):
        weight = torch.nn.Parameter(values.bfloat16())
        still = torch.optim.SGD([weight], lr=0.0)
        scale = mpcore.NoLossScale()
        return engine.wrap(still, scale, on_weight_edit=rule, masters=masters), weight

    def step(optimizer, weight):
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    source = "split" if target == "float32" else "float32"
    first, old = wrapped(source, tie)
    first.adopt_masters([(old, tie.clone())])
    step(first, old)
    assert old.tolist() == rounded[source]
    second, new = wrapped(target, old.detach())
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        step(second, new)
        assert torch.equal(second.float32_state(new)["master"], tie)
        assert new.tolist() == rounded[target]


@ENGINES
def test_a_state_without_its_weights_is_noticed(engine):
    first = trained(engine, torch.bfloat16, "split")
    second = stored(engine, adamw, torch.bfloat16, masters="split")
    second.step(9)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert "group 0, parameter 0, [3, 5]" in second.optimizer.check_masters()
    second.give(4)
    with pytest.raises(mpcore.StageError, match="was loaded without the model's"):
        second.optimizer.step()
    second.optimizer.sync_masters_from_model()
    second.optimizer.step()
    assert second.optimizer.check_masters() == []


@ENGINES
def test_a_state_that_is_loaded_waits_for_its_weights_until_a_step(engine):
    first = trained(engine, torch.bfloat16, "split")
    second = stored(engine, adamw, torch.bfloat16, masters="split")
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert next(iter(second.optimizer.state[second.params[0]])) == "master"
    with torch.no_grad():
        for mine, theirs in zip(second.params, first.params, strict=True):
            mine.copy_(theirs)
    second.give(5)
    second.optimizer.clip_grad_norm_(1.0)
    assert next(iter(second.optimizer.state[second.params[0]])) == "master"
    second.optimizer.step()
    assert next(iter(second.optimizer.state[second.params[0]])) == "remainder"


def test_other_systems_get_float32():
    one = trained(Engine("compiled", "general"), torch.bfloat16, "split")
    model = torch.nn.ParameterList(one.params)
    wide = migration.float32_state_dict(model, one.optimizer)
    for value, state, param in zip(wide.values(), one.states(), one.params, strict=True):
        assert torch.equal(value, state.get("master", param.detach()))
    plain = migration.to_torch(one.optimizer)
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in plain["state"].values())


def keys_of(one):
    """Returns the tensors by which the wrapped optimizer knows masters."""
    known = one.optimizer.inner.state
    return [key for key in known if not any(key is param for param in one.params)]


@ENGINES
def test_a_remainder_after_shared_float32_masters_leaves_nothing_of_those_in_memory(engine):
    one = stored(engine, adamw, torch.bfloat16, masters="split")
    sgd = torch.optim.SGD(one.params, lr=1e-3)
    other = mpcore.MixedPrecisionOptimizer(sgd, masters="split", backend="reference")
    one.step(0)
    Stored(other, one.params).step(1)  # it holds the masters as well
    packed = bytes_of(keys_of(one))
    compact = copy.deepcopy(one.optimizer.state_dict(compact=True))
    one.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    assert bytes_of(keys_of(one)) > packed
    one.optimizer.load_state_dict(compact)
    assert bytes_of(keys_of(one)) == packed
    assert all(key.isnan().all() for key in keys_of(one))


@ENGINES
def test_a_remainder_put_in_the_place_of_a_float32_master_leaves_nothing_of_it_in_memory(engine):
    one = trained(engine, torch.bfloat16, "split")
    packed = bytes_of(keys_of(one))
    remainders = [one.optimizer.state[p].get("remainder") for p in one.params]
    one.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    for param, remainder in zip(one.params, remainders, strict=True):
        if remainder is not None:
            del one.optimizer.state[param]["master"]
            one.optimizer.state[param]["remainder"] = remainder.clone()
    one.step(9)
    assert bytes_of(keys_of(one)) == packed
