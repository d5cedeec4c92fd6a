"""Checkpoints of compact moments, and of weights without masters: float32, or as they lie."""

import copy
import io
import pickle

import mpcore
import pytest
import torch
from mpcore import migration

from mpcore_testing.bits import same_bits
from mpcore_testing.compact import ADAMW, BUILDS, ENGINES, compact, load
from mpcore_testing.engines import Engine
from mpcore_testing.stored import assert_same_states, bytes_of

KEPT = pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
MASTERS = pytest.mark.parametrize("masters", ["float32", "split", "none"])
COMPILED = Engine("compiled", "fused")


def trained(engine, build=ADAMW, steps=3, **options):
    one = compact(engine, build, **options)
    for seed in range(steps):
        one.step(seed, overflow=seed == 1)
    return one


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@KEPT
@MASTERS
@ENGINES
@pytest.mark.parametrize("as_it_lies", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "momentum", "SGD"])
def test_a_resumed_training_has_the_bits_of_one_that_went_on(
    name, as_it_lies, engine, masters, moments
):
    kept = {"masters": masters, "moments": moments, "seed": 5}
    first = trained(engine, BUILDS[name], **kept)
    saved = through_a_file(first.optimizer.state_dict(compact=as_it_lies))
    second = compact(engine, BUILDS[name], **kept)
    second.step(9)
    load(second, saved, first.params)
    for seed in (3, 4, 5):
        for one in (first, second):
            one.step(seed, overflow=seed == 4)
    assert same_bits(first.bits(), second.bits())


@ENGINES
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_compact_state_brings_its_keys(engine, moments):
    first = trained(engine, moments=moments, seed=5)
    second = compact(engine, moments=moments, seed=6)
    load(second, first.optimizer.state_dict(compact=True), first.params)
    for one in (first, second):
        one.step(5)
    assert same_bits(first.bits(), second.bits())
    # those of a float32 one are made anew, from the other seed
    load(second, first.optimizer.state_dict(), first.params)
    for one in (first, second):
        one.step(6)
    assert not same_bits(first.bits(), second.bits())


WAYS = [(m, k) for m in ("float32", "split", "none") for k in ("float32", "bfloat16", "int8")]


@ENGINES
@pytest.mark.parametrize("source", WAYS, ids="-".join)
@pytest.mark.parametrize("target", WAYS[::2], ids="-".join)
def test_states_go_from_any_store_to_any_other(source, target, engine):
    first = trained(engine, masters=source[0], moments=source[1])
    saved = first.optimizer.state_dict()
    assert set(saved["state"][0]) == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert {value.dtype for value in saved["state"][0].values()} == {torch.float32}
    second = compact(engine, masters=target[0], moments=target[1])
    second.step(9)
    load(second, saved, first.params)
    # float32 till the step that packs it
    assert same_bits(second.optimizer.state_dict()["state"], saved["state"])
    second.step(5)
    assert second.optimizer.check_masters() == []
    if source[1] == target[1] and source[0] == target[0]:
        first.step(5)
        assert_same_states(first, second)


@ENGINES
def test_what_torch_is_given_has_nothing_of_ours(engine):
    first = trained(engine, masters="none", moments="int8")
    plain = migration.to_torch(first.optimizer)
    assert set(plain["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    params = [torch.nn.Parameter(param.detach().float()) for param in first.params]
    torch.optim.AdamW(params).load_state_dict(plain)
    half = compact(engine, masters="none", moments="int8")
    load(half, migration.from_torch(half.optimizer, plain, masters=params), first.params)
    for one in (first, half):
        one.step(5)
    assert same_bits(first.bits(), half.bits())


def test_a_compact_file_has_half_the_bytes():
    sizes = []
    for as_it_lies in (False, True):
        one = trained(COMPILED, masters="split", moments="bfloat16")
        saved = one.optimizer.state_dict(compact=as_it_lies)["state"]
        tensors = [t for number in (0, 1, 2) for t in saved[number].values() if torch.is_tensor(t)]
        sizes.append(bytes_of([t for t in tensors if t.dim()]))
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_another_store_refuses_a_compact_state_and_nothing_has_changed(moments):
    saved = trained(COMPILED, moments=moments).optimizer.state_dict(compact=True)
    other = trained(COMPILED, moments="float32")
    before = other.bits()
    with pytest.raises(mpcore.ArgumentError, match=r"with the masters= and moments= of|exp_avg"):
        other.optimizer.load_state_dict(saved)
    assert same_bits(other.bits(), before)


def test_float32_masters_refuse_a_state_without_any():
    saved = trained(COMPILED, masters="none").optimizer.state_dict(compact=True)
    other = trained(COMPILED)
    before = other.bits()
    with pytest.raises(mpcore.ArgumentError, match="expected the keys"):
        other.optimizer.load_state_dict(saved)
    assert same_bits(other.bits(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update(exp_avg=s["exp_avg"].float()),
            "expected none beside a moment of torch.f",
        ),
        (lambda s: s.update(exp_avg=s["exp_avg"].short()), "expected a torch.float32 tensor"),
        (lambda s: s.update(exp_avg=s["exp_avg"][:1]), r"expected a .* shape \[4, 300\]"),
        (lambda s: s.pop("exp_avg_scales"), r"expected float32 \[4, 2\] beside .*, got None"),
        (lambda s: s.update(exp_avg_scales=torch.ones(4, 1)), r"\[4, 2\] beside .*\[4, 1\]"),
        (lambda s: s.update(exp_avg_scales=3), r"\[4, 2\] beside .*, got 3"),
        (lambda s: s.update(random_key=-1), "expected an integer below 2.64, got -1"),
        (lambda s: s.update(random_key=torch.ones(())), "expected an integer below 2.64"),
        (lambda s: s.update(sum_scales=torch.ones(4, 2)), "got 'sum_scales' too"),
    ],
)
def test_a_broken_compact_state_is_refused(change, message):
    one = trained(COMPILED, moments="int8")
    saved = copy.deepcopy(one.optimizer.state_dict(compact=True))
    change(saved["state"][0])
    before = one.bits()
    with pytest.raises(mpcore.ArgumentError, match=message):
        one.optimizer.load_state_dict(saved)
    assert same_bits(one.bits(), before)


@KEPT
@MASTERS
@ENGINES
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_with_the_same_bits(copied, engine, masters, moments):
    one = trained(engine, masters=masters, moments=moments)
    other = copied(one)
    assert (other.optimizer.masters, other.optimizer.moments) == (masters, moments)
    for seed in (3, 4):
        for each in (one, other):
            each.step(seed)
    assert same_bits(one.bits(), other.bits())
