"""`moments="bfloat16"` and `"int8"`: float32 steps whose moments are rounded at random."""

import mpcore
import pytest
import torch
from mpcore.engine.fused_only import check_fused
from mpcore.updates import rule_of

from mpcore_testing.bits import same_bits
from mpcore_testing.compact import (
    ADAMW,
    BUILDS,
    ENGINES,
    assert_rounded_from,
    compact,
    load,
    weights,
)
from mpcore_testing.engines import Engine
from mpcore_testing.stored import assert_same_states

KEPT = pytest.mark.parametrize("moments", ["bfloat16", "int8"])
MASTERS = pytest.mark.parametrize("masters", ["float32", "split", "none"])
#: every way to keep a weight beside compact moments
WAYS = pytest.mark.parametrize(
    ("masters", "dtype"),
    [
        ("float32", torch.bfloat16),
        ("float32", torch.float16),
        ("split", torch.bfloat16),
        ("split", torch.float16),
        ("none", torch.bfloat16),
    ],
)


@KEPT
@WAYS
@ENGINES
@pytest.mark.parametrize("name", BUILDS)
def test_a_step_is_that_of_float32_rounded_at_random(name, engine, masters, dtype, moments):
    build = BUILDS[name]
    ours = compact(engine, build, dtype=dtype, masters=masters, moments=moments, seed=7)
    inner = ours.optimizer.inner
    names = rule_of(inner).moments(inner.param_groups[0])
    for seed in range(4):
        if name == "Adagrad" and seed == 0:  # begins at 0.1, which is rounded to nearest first
            ours.step(seed)
            continue
        # the same step over the same numbers in float32
        plain = compact(engine, build, dtype=dtype)
        if seed:
            load(plain, ours.optimizer.state_dict(), ours.params)
        for one in (ours, plain):
            one.step(seed, max_norm=0.5)
        assert not ours.optimizer.last_step.skipped
        assert_rounded_from(ours, plain, names, seed=7)


@KEPT
@MASTERS
def test_both_backends_have_the_same_bits(masters, moments):
    reference, compiled = (
        compact(Engine(name, "fused"), masters=masters, moments=moments)
        for name in ("reference", "compiled")
    )
    for seed in range(8):
        for one in (reference, compiled):
            one.step(seed, overflow=seed in (0, 5))
        assert same_bits(reference.bits(), compiled.bits())


@KEPT
@MASTERS
@ENGINES
@pytest.mark.parametrize("name", ["AdamW", "SGD", "momentum"])
def test_a_skipped_step_changes_nothing_and_draws_nothing(name, engine, masters, moments):
    one, other = (
        compact(engine, BUILDS[name], masters=masters, moments=moments, loss_scale=still())
        for _ in range(2)
    )
    for seed in range(3):
        one.step(seed)
        before = one.bits()
        one.step(9, overflow=True)
        assert same_bits(one.bits(), before)
        other.step(seed)
    assert one.optimizer.skipped_steps == 3
    assert same_bits(one.bits(), other.bits())


def still():
    return mpcore.StaticLossScale(2.0**9)


@KEPT
@ENGINES
def test_a_seed_decides_what_is_drawn(engine, moments):
    several = [compact(engine, moments=moments, seed=seed) for seed in (3, 3, 4)]
    for one in several:
        one.step(0)
    first, same, other = (one.bits()[1] for one in several)
    assert same_bits(first, same)
    pairs = zip(first, other, strict=True)
    assert all(not torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in pairs)


@ENGINES
@pytest.mark.parametrize("masters", ["float32", "split"])
def test_what_has_no_moments_steps_as_ever(masters, engine):
    ours, plain = (
        compact(engine, BUILDS["SGD"], masters=masters, moments=moments)
        for moments in ("int8", "float32")
    )
    for seed in range(3):
        for one in (ours, plain):
            one.step(seed)
    assert_same_states(ours, plain)
    assert not any(ours.optimizer.state[p].get("random_key") for p in ours.params)


def test_float32_moments_are_none_of_this():
    one = compact(Engine("compiled", "fused"))
    one.step(0)
    assert set(one.optimizer.state[one.params[0]]) == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert (one.optimizer.masters, one.optimizer.moments) == ("float32", "float32")


@ENGINES
def test_which_parameters_have_8_bits(engine):
    one = compact(engine, moments="int8")
    one.step(0)
    kinds = [
        (state["exp_avg"].dtype, state["exp_avg_sq"].dtype, "exp_avg_scales" in state)
        for state in map(one.optimizer.state.get, one.params)
    ]
    codes, short = (torch.int8, torch.uint8, True), (torch.bfloat16, torch.bfloat16, False)
    # the third one is transposed: its rows do not lie in memory
    assert kinds == [codes, short, short, codes, short]
    assert one.optimizer.state[one.params[0]]["exp_avg_scales"].shape == (4, 2)
    assert one.optimizer.moments == "int8"


# ------------------------------------------------------------------ ways to step


@KEPT
@MASTERS
@ENGINES
def test_micro_batches_are_one_step_of_their_sum(engine, masters, moments):
    one, other = (compact(engine, moments=moments, masters=masters) for _ in range(2))
    for step in range(3):
        one.give(step)
        one.optimizer.accumulate()
        one.give(step + 10)
        one.optimizer.accumulate()
        one.optimizer.step()
        one.optimizer.zero_grad()
        other.give(step)
        other.optimizer.unscale_()
        first = [param.grad.clone() for param in other.params]
        other.optimizer.zero_grad()
        other.give(step + 10)
        other.optimizer.unscale_()
        for param, grad in zip(other.params, first, strict=True):
            param.grad.add_(grad)
        other.optimizer.step()
        other.optimizer.zero_grad()
    assert same_bits(one.bits(), other.bits())


@KEPT
@MASTERS
@ENGINES
def test_a_closure_steps_once(engine, masters, moments):
    one, other = (compact(engine, moments=moments, masters=masters) for _ in range(2))
    for seed in range(3):
        one.optimizer.step(lambda seed=seed: one.give(seed, overflow=seed == 1))
        other.step(seed, overflow=seed == 1)
    assert same_bits(one.bits(), other.bits())


@KEPT
@MASTERS
@ENGINES
def test_a_grad_scaler_steps(engine, masters, moments):
    one = compact(engine, moments=moments, masters=masters, loss_scale=mpcore.NoLossScale())
    other = compact(engine, moments=moments, masters=masters, loss_scale=still())
    scaler = mpcore.GradScaler("cpu", init_scale=2.0**9, growth_interval=1000)
    for seed in range(3):
        one.give(seed, scaler=scaler)
        scaler.step(one.optimizer)
        scaler.update()
        one.optimizer.zero_grad()
        other.step(seed)
    assert same_bits(one.bits(), other.bits())


@KEPT
@MASTERS
@ENGINES
def test_schedulers_and_groups_that_are_added(engine, masters, moments):
    params = weights(torch.bfloat16)
    optimizer = engine.wrap(ADAMW(params[:2]), still(), masters=masters, moments=moments)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.add_param_group({"params": params[2:], "lr": 1e-2})
    whole = compact(engine, moments=moments, masters=masters, loss_scale=still())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.scale(torch.ones(()))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-3]
    for param in whole.params:
        param.grad = torch.ones_like(param)
    whole.optimizer.scale(torch.ones(()))
    whole.optimizer.step()
    # places go on counting: keys are those of one group of all
    keys = [optimizer.state[param]["random_key"] for param in params]
    assert keys == [whole.optimizer.state[param]["random_key"] for param in whole.params]
    assert len(set(keys)) == 5


@ENGINES
def test_a_chain_has_keys_of_its_own_for_each_parameter(engine):
    params = weights(torch.bfloat16)
    chain = mpcore.optim.ChainedOptimizer(
        torch.optim.AdamW(params[:2]), torch.optim.SGD(params[2:], momentum=0.9, lr=0.1)
    )
    optimizer = engine.wrap(chain, still(), moments="bfloat16")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.scale(torch.ones(()))
    optimizer.step()
    assert len({optimizer.state[param]["random_key"] for param in params}) == 5
    assert optimizer.state[params[2]]["momentum_buffer"].dtype == torch.bfloat16


# ------------------------------------------------------------------ what is refused by name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "float16"}, "moments: expected one of float32, bfloat16, int8, got 'float16'"),
        ({"moments": "int8", "seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"masters": "half"}, "masters: expected one of float32, split, none, got 'half'"),
        ({"moments": "int8", "backend": "cpu"}, 'moments="int8": expected one of the backends'),
        ({"masters": "none", "backend": "cpu"}, "masters: expected .* with the backend .cpu."),
        ({"moments": "int8", "path": "general"}, 'moments="int8": expected path="auto" or "fused"'),
        ({"masters": "none", "path": "general"}, 'masters="none": expected path="auto" or "fused"'),
    ],
)
def test_what_cannot_be_combined(options, message):
    params = weights(torch.bfloat16)
    options = {"backend": "reference", **options}
    with pytest.raises(mpcore.ArgumentError, match=message):
        mpcore.MixedPrecisionOptimizer(ADAMW(params), mpcore.NoLossScale(), **options)
    mpcore.MixedPrecisionOptimizer(ADAMW(params))  # what was refused is as it was


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_backends_without_compact_moments_are_named(backend):
    with pytest.raises(mpcore.ArgumentError, match=f"one of the backends .* got '{backend}'"):
        check_fused('moments="int8"', "auto", backend, [None])


def test_the_reference_backend_fuses_by_itself_where_only_that_works():
    optimizer = mpcore.MixedPrecisionOptimizer(
        ADAMW(weights(torch.bfloat16)), backend="reference", moments="bfloat16"
    )
    assert [path.path for path in optimizer.path] == ["fused"]


@ENGINES
@pytest.mark.parametrize("kept", [{"moments": "bfloat16"}, {"masters": "none"}])
def test_a_group_that_is_not_fused_is_refused_and_never_silently_float32(engine, kept):
    params = weights(torch.bfloat16)
    with pytest.raises(
        mpcore.ArgumentError, match=r"expected param groups whose.* 0: no fused update for RMSp"
    ):
        engine.wrap(torch.optim.RMSprop(params), **kept)
    chain = mpcore.optim.ChainedOptimizer(
        torch.optim.AdamW(params[:2]), torch.optim.Rprop(params[2:])
    )
    with pytest.raises(
        mpcore.ArgumentError, match=r"expected param groups whose.* 1: no fused update for Rprop"
    ):
        engine.wrap(chain, **kept)


@ENGINES
def test_a_group_that_stops_being_fused_is_refused_before_anything_changes(engine):
    one = compact(engine, moments="bfloat16")
    one.step(0)
    before = one.bits()
    one.optimizer.param_groups[0]["foreach"] = True
    one.give(1)
    with pytest.raises(mpcore.ArgumentError, match="got param group 0: foreach=True"):
        one.optimizer.step()
    assert same_bits(one.bits(), before)
    assert "got param group 0: foreach=True" in repr(one.optimizer)
    one.optimizer.param_groups[0]["foreach"] = None
    one.optimizer.step()
    assert not same_bits(one.bits(), before)


@ENGINES
def test_methods_of_the_wrapped_optimizer_are_refused(engine):
    params = weights(torch.bfloat16)
    chain = mpcore.optim.ChainedOptimizer(torch.optim.AdamW(params))
    optimizer = engine.wrap(chain, moments="bfloat16")
    with pytest.raises(mpcore.ArgumentError, match="expected no call of methods of the wrapped"):
        optimizer.linked()
