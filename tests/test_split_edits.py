"""Split masters beside what others do to weights, states and copies of them."""

import copy
import io
import pickle

import mpcore
import pytest
import torch
from mpcore import migration
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import PACKING, Engine
from mpcore_testing.stored import SCALE, assert_same_states, bytes_of, stored

ENGINES = pytest.mark.parametrize("engine", PACKING, ids=str)
HALVES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


def still(params):
    """An optimizer whose step changes no master."""
    return torch.optim.SGD(params, lr=0.0)


def trained(engine, dtype, build=adamw, steps=3):
    one = stored(engine, build, dtype, masters="split")
    for seed in range(steps):
        one.step(seed)
    return one


def master_of(one, index=0):
    return one.optimizer.float32_state(one.params[index])["master"]


# ------------------------------------------------------------------ weights that others write to


@HALVES
@ENGINES
def test_what_is_written_to_a_weight_counts_and_the_remainder_stays(engine, dtype):
    one = trained(engine, dtype)
    weight = one.params[0]
    remainder = one.optimizer.state[weight]["remainder"].clone()
    before = master_of(one)
    with torch.no_grad():
        weight[0] = 3.0
        weight.data[1, 0] = 0.0
    master = master_of(one)
    place = 2.0 ** (-9 if dtype == torch.float16 else -6)
    assert ((master[0] - 3.0).abs() < place).all()
    assert master[1, 0] == 0.0 or abs(master[1, 0]) < 2.0**-24
    assert torch.equal(master[2], before[2])
    assert torch.equal(one.optimizer.state[weight]["remainder"], remainder)
    assert one.optimizer.check_masters() == []
    one.optimizer.sync_masters_from_model()
    assert torch.equal(master_of(one), master)
    one.optimizer.sync_masters_from_model(exact=True)
    assert torch.equal(master_of(one), weight.detach().float())


@ENGINES
def test_a_step_neither_warns_nor_compares_after_an_edit(engine):
    one, twin = trained(engine, torch.bfloat16, still), trained(engine, torch.bfloat16, still)
    for other in (one, twin):
        with torch.no_grad():
            other.params[0].mul_(2)
    expected = master_of(twin)
    one.step(7)
    assert torch.equal(master_of(one), expected)


@HALVES
def test_an_average_that_was_swapped_in_and_out_leaves_no_trace(dtype):
    one = trained(Engine("compiled", "general"), dtype)
    before = one.bits()
    saved = [param.detach().clone() for param in one.params]
    with torch.no_grad():
        for param in one.params:
            param.zero_()
    one.optimizer.check_masters(), one.optimizer.state_dict()
    with torch.no_grad():
        for param, value in zip(one.params, saved, strict=True):
            param.copy_(value)
    assert same_bits(one.bits(), before)


@ENGINES
def test_weights_of_higher_precision_are_taken(engine):
    weight = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = engine.wrap(torch.optim.SGD([("w", weight)], lr=0.0), SCALE, masters="split")
    exact = torch.tensor([1.001, -2.003, 1 / 3])
    for _ in range(2):  # before there is a master, and after
        optimizer.adopt_masters([(weight, torch.ones(3))]) if not optimizer.state else None
        optimizer.sync_masters_from_model({"w": exact})
        assert torch.equal(optimizer.float32_state(weight)["master"], exact)
        optimizer.backward(weight.float().sum())
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(optimizer.float32_state(weight)["master"], exact)
        assert next(iter(optimizer.state[weight])) == "remainder"


# ------------------------------------------------------------------ the first weights


@HALVES
@ENGINES
def test_a_model_that_is_cast_keeps_the_digits_of_its_originals(engine, dtype):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    exact = model.weight.detach().clone()
    optimizer = engine.wrap(still(model.parameters()), SCALE, masters="split")
    model = mpcore.cast_model(model, dtype, optimizer)
    assert torch.equal(optimizer.state[model.weight]["master"], exact)
    for _ in range(2):
        optimizer.backward(model(torch.ones(2, 8, dtype=dtype)).float().sum())
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(optimizer.float32_state(model.weight)["master"], exact)
        assert next(iter(optimizer.state[model.weight])) == "remainder"
    assert torch.equal(migration.float32_state_dict(model, optimizer)["weight"], exact)


@HALVES
@ENGINES
def test_a_first_step_that_is_skipped_writes_both_halves(engine, dtype):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    exact = model.weight.detach().clone()
    optimizer = engine.wrap(adamw(model.parameters()), SCALE, masters="split")
    model = mpcore.cast_model(model, dtype, optimizer)
    optimizer.backward(model(torch.full((2, 8), 1e38 if dtype != torch.float16 else 6e4)).sum())
    optimizer.step()
    assert optimizer.last_step.skipped
    assert next(iter(optimizer.state[model.weight])) == "remainder"
    assert torch.equal(optimizer.float32_state(model.weight)["master"], exact)


@ENGINES
def test_what_is_written_between_the_cast_and_the_first_step_is_adopted(engine):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    exact = model.weight.detach().clone()
    optimizer = engine.wrap(still(model.parameters()), SCALE, masters="split")
    model = mpcore.cast_model(model, torch.bfloat16, optimizer)
    with torch.no_grad():
        model.weight[0, 0] = 0.75
    optimizer.backward(model(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum())
    with pytest.warns(UserWarning, match="^1 elements of"):
        optimizer.step()
    exact[0, 0] = 0.75
    assert torch.equal(optimizer.float32_state(model.weight)["master"], exact)


# ------------------------------------------------------------------ states that others write to


@HALVES
@ENGINES
def test_edits_of_a_remainder_count(engine, dtype):
    one = trained(engine, dtype, still)
    weight = one.params[0]
    one.optimizer.state[weight]["remainder"].zero_()
    one.optimizer.state[one.params[1]]["remainder"] = torch.full((7,), 64, dtype=torch.int16)
    one.step(5)
    assert torch.equal(master_of(one), weight.detach().float())
    assert (one.optimizer.state[one.params[1]]["remainder"] == 64).all()
    assert not torch.equal(master_of(one, 1), one.params[1].detach().float())


@pytest.mark.parametrize("bad", [torch.zeros(7), torch.zeros(3, dtype=torch.int16), 1])
def test_a_remainder_that_is_none_is_refused_and_nothing_has_changed(bad):
    one = trained(Engine("compiled", "general"), torch.bfloat16)
    there = one.optimizer.state[one.params[1]]["remainder"]
    before = one.bits()
    one.optimizer.state[one.params[1]]["remainder"] = bad
    one.give(4)
    with pytest.raises(mpcore.ArgumentError, match=r"remainder.*expected a torch.int16 tensor"):
        one.optimizer.step()
    one.optimizer.state[one.params[1]]["remainder"] = there
    assert same_bits(one.bits(), before)
    one.optimizer.step()


@ENGINES
def test_a_state_moves_to_another_parameter(engine):
    one = trained(engine, torch.bfloat16, still)
    old, before = one.params[0], master_of(one)
    new = one.params[0] = nn.Parameter(old.detach().clone())
    one.optimizer.param_groups[0]["params"][0] = new
    one.optimizer.state[new] = one.optimizer.state.pop(old)
    one.step(4)
    assert torch.equal(one.optimizer.float32_state(new)["master"], before)


@HALVES
@ENGINES
def test_float32_state_is_read_and_written(engine, dtype):
    one = trained(engine, dtype, still if engine.fused else adamw)
    weight, optimizer = one.params[0], one.optimizer
    state = optimizer.float32_state(weight)
    state["master"].zero_()
    assert not torch.equal(optimizer.float32_state(weight)["master"], state["master"])
    exact = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    optimizer.set_float32_state(weight, {"master": exact})
    assert torch.equal(optimizer.float32_state(weight)["master"], exact)
    assert ((weight.detach().float() - exact).abs() <= exact.abs() * 2.0**-8).all()
    assert next(iter(optimizer.state[weight])) == "remainder"
    if "exp_avg" in state:
        optimizer.set_float32_state(weight, {"exp_avg": exact.double()})
        assert torch.equal(optimizer.state[weight]["exp_avg"], exact)
    before = one.bits()
    for values, message in (
        ({"master": torch.zeros(2)}, r"shape \[3, 5\], got \[2\]"),
        ({"master": exact, "momentum": exact}, "got 'momentum' too"),
        ({"master": exact.long()}, "expected a floating tensor"),
    ):
        with pytest.raises(mpcore.ArgumentError, match=message):
            optimizer.set_float32_state(weight, values)
    with pytest.raises(mpcore.ArgumentError, match="which it does not hold"):
        optimizer.float32_state(torch.ones(2))
    assert same_bits(one.bits(), before)


# ------------------------------------------------------------------ copies, shared parameters


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))


def by_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@HALVES
@ENGINES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_file])
def test_copies_go_on_with_the_same_bits(duplicate, engine, dtype):
    one = trained(engine, dtype)
    other = duplicate(one)
    for each in (one, other):
        for seed in (5, 6):
            each.step(seed)
    assert_same_states(one, other)
    assert same_bits(one.bits(), other.bits())
    assert bytes_of([other.optimizer._masters.of(other.params[0])]) == 4


@ENGINES
def test_two_optimizers_share_a_split_master(engine):
    def run(masters):
        torch.manual_seed(0)
        model = nn.Linear(6, 5, bias=False)
        scale = mpcore.NoLossScale()
        both = [engine.wrap(adamw(model.parameters()), scale, masters=masters) for _ in range(2)]
        mpcore.cast_model(model, torch.bfloat16, both[0])
        found = []
        for turn in (0, 1, 1, 0):
            model.weight.grad = torch.ones_like(model.weight)
            both[turn].step()
            both[turn].zero_grad()
            found += [each.float32_state(model.weight)["master"] for each in both[: turn + 1]]
        assert same_bits(found[-1], both[1].float32_state(model.weight)["master"])
        return found, both, model

    split, (first, second), model = run("split")
    whole, _, _ = run("float32")
    assert same_bits(split, whole)
    first.state_dict(), second.state_dict()  # each shows what lies there now
    beside = [each.state[model.weight]["remainder"] for each in (first, second)]
    assert beside[0] is beside[1]


@pytest.mark.parametrize("stores", [("split", "float32"), ("float32", "split")])
def test_a_shared_parameter_has_a_master_of_one_kind(stores):
    weight = nn.Parameter(torch.ones(3).half())
    engine = Engine("reference", "general")
    first, second = [engine.wrap(adamw([weight]), SCALE, masters=store) for store in stores]
    first.backward(weight.float().sum())
    first.step()
    first.zero_grad()
    before = first.float32_state(weight)
    second.backward(weight.float().sum())
    with pytest.raises(mpcore.ArgumentError, match="give both optimizers the same masters="):
        second.step()
    assert same_bits(first.float32_state(weight), before)


# ------------------------------------------------------------------ what is refused


def wrap(**options):
    params = [nn.Parameter(torch.ones(3).half())]
    return mpcore.MixedPrecisionOptimizer(torch.optim.AdamW(params), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masters": "half"}, "masters: expected one of float32, split, none, got 'half'"),
        ({"masters": "split", "backend": "cpu"}, 'Pass backend="reference"'),
        ({"masters": "split", "on_weight_edit": "raise"}, 'expected "adopt" or "always"'),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(options, message):
    with pytest.raises(mpcore.ArgumentError, match=message):
        wrap(**options)
    if options.get("backend") == "cpu":  # the advice
        wrap(masters="split", backend="reference", path="fused")
