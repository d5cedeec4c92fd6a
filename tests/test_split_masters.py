"""`masters="split"`: the bits of float32 masters in half the bytes, step for step."""

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import PACKING, Engine, engines_for
from mpcore_testing.optimizers import step_cases
from mpcore_testing.stored import BUILDS, SCALE, assert_same_states, bytes_of, stored
from mpcore_testing.two_steps import Sharp

ADAMW = BUILDS["AdamW"]
DTYPES = [torch.float16, torch.bfloat16]
HALVES = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
ENGINES = pytest.mark.parametrize("engine", PACKING, ids=str)


def pair(engine, dtype, build=ADAMW, **options):
    return [stored(engine, build, dtype, masters=m, **options) for m in ("split", "float32")]


def assert_weights_round_masters(one):
    """Nearest, by torch's own rounding, but for ties of bfloat16: these go away from zero."""
    for param, state in zip(one.params, one.states(), strict=True):
        if "master" in state:
            towards = torch.where(state["master"] < 0, -torch.inf, torch.inf)
            further = torch.nextafter(state["master"], towards)  # breaks the tie
            wanted = [state["master"].to(param.dtype), further.to(param.dtype)]
            assert ((param == wanted[0]) | (param == wanted[1])).all()
            if param.dtype == torch.float16:
                assert torch.equal(param.detach(), wanted[0])


@HALVES
@ENGINES
@pytest.mark.parametrize("name", BUILDS)
def test_masters_and_moments_have_the_bits_of_float32_masters(name, engine, dtype):
    split, whole = pair(engine, dtype, BUILDS[name])
    for seed in range(12):
        for one in (split, whole):
            clip = {"max_norm": 0.1} if seed % 3 == 1 else {}
            one.step(seed, overflow=seed in (0, 6), **clip)
        assert_same_states(split, whole)
        assert split.optimizer.loss_scale == whole.optimizer.loss_scale
    assert_weights_round_masters(split)
    assert split.optimizer.skipped_steps == 2
    assert "master" not in split.optimizer.state[split.params[0]]
    assert split.optimizer.masters == "split"


@HALVES
@ENGINES
def test_gradients_that_were_edited_added_up_or_given_by_others(engine, dtype):
    split, whole = pair(engine, dtype)
    for one in (split, whole):
        optimizer = one.optimizer
        one.give(0)
        optimizer.unscale_()
        for param in one.params:
            param.grad.mul_(0.5)
        one.params[3].grad = one.params[3].grad.t().clone().t()
        optimizer.step()
        for seed in (1, 2):
            one.give(seed)
            optimizer.accumulate()
        optimizer.step()
        one.give(3)
        one.params[1].grad = None
        optimizer.step(lambda: None)
    assert_same_states(split, whole)


@ENGINES
def test_a_grad_scaler_steps(engine):
    split, whole = pair(engine, torch.float16, loss_scale=mpcore.NoLossScale())
    for one in (split, whole):
        scaler = mpcore.GradScaler("cpu", init_scale=2.0**9)
        for seed in range(4):
            one.give(seed, overflow=seed == 1, scaler=scaler)
            scaler.unscale_(one.optimizer)
            torch.nn.utils.clip_grad_norm_(one.params, 0.1)
            scaler.step(one.optimizer)
            scaler.update()
            one.optimizer.zero_grad()
    assert_same_states(split, whole)
    assert_weights_round_masters(split)


@ENGINES
def test_losses_of_their_own(engine):
    ours = []
    for masters in ("split", "float32"):
        one = stored(engine, ADAMW, torch.float16, masters=masters)
        other = one.optimizer.add_loss("other", mpcore.StaticLossScale(4.0))
        weight = one.params[0]
        for _ in range(3):
            one.optimizer.backward(weight.float().square().sum())
            other.backward(weight.float().sin().sum())
            one.optimizer.step()
            one.optimizer.zero_grad()
        ours.append(one.optimizer.float32_state(weight))
    assert same_bits(*ours)


@HALVES
@ENGINES
def test_a_parameter_takes_14_bytes(engine, dtype):
    weight = nn.Parameter(torch.randn(64, 32).to(dtype))
    optimizer = engine.wrap(ADAMW([weight]), SCALE, masters="split")
    optimizer.backward(weight.float().square().mean())
    optimizer.step()
    state = optimizer.state[weight]
    lying = [weight, weight.grad, *(value for name, value in state.items() if name != "step")]
    assert bytes_of(lying) == 14 * weight.numel()
    key = optimizer._masters.of(weight)
    assert bytes_of([key]) == 4
    assert key.isnan().all()
    assert key.grad is None


@HALVES
@ENGINES
def test_a_skipped_step_changes_nothing(engine, dtype):
    one = stored(engine, ADAMW, dtype, masters="split")
    for seed in range(3):
        one.step(seed)
    before = one.bits()
    one.step(3, overflow=True)
    assert one.optimizer.skipped_steps == 1
    assert same_bits(one.bits(), before)


@HALVES
@pytest.mark.parametrize("case", step_cases()[::3], ids=str)
def test_any_optimizer_of_torch(case, dtype):
    for engine in engines_for(case.build):
        if engine not in PACKING or engine.fused:
            continue
        split, whole = list(pair(engine, dtype, lambda p: case.build(flat(case, p))))
        for seed in range(4):
            for one in (split, whole):
                one.params = flat(case, one.params)
                one.step(seed, overflow=seed == 2 and not case.starts_together)
        assert_same_states(split, whole)


def flat(case, params):
    return [p for p in params if p.dim() == 2] if case.matrices_only else list(params)


# ------------------------------------------------------------------ closures, two calls


@HALVES
def test_closures_are_evaluated_over_the_same_masters(dtype):
    def closure(one):
        def evaluate():
            one.optimizer.zero_grad()
            loss = sum(p.float().sub(0.25).square().sum() for p in one.params)
            one.optimizer.backward(loss)
            return loss

        return evaluate

    def build(params):
        return torch.optim.LBFGS(params[:3], lr=0.5, max_iter=3, line_search_fn="strong_wolfe")

    split, whole = pair(Engine("compiled", "general"), dtype, build)
    split.params, whole.params = split.params[:3], whole.params[:3]
    for _ in range(3):
        losses = [one.optimizer.step(closure(one)) for one in (split, whole)]
        assert same_bits(*losses)
        assert_same_states(split, whole)
    before = split.bits()
    split.optimizer.step(lambda: split.give(0, overflow=True))
    assert split.optimizer.last_step.skipped
    assert same_bits(split.bits(), before)
    assert split.optimizer._masters.of(split.params[0]).isnan().all()  # nothing is decoded any more


@HALVES
@pytest.mark.parametrize("at", [None, 0, 1])
def test_steps_of_two_calls(at, dtype):
    def build(params):
        return Sharp(params)

    split, whole = pair(Engine("reference", "general"), dtype, build)
    for seed in range(3):
        before = split.bits()
        for one in (split, whole):
            one.give(2 * seed, overflow=at == 0 and seed == 1)
            one.optimizer.first_step(zero_grad=True)
            one.give(2 * seed + 1, overflow=at == 1 and seed == 1)
            one.optimizer.second_step(zero_grad=True)
        assert_same_states(split, whole)
        assert same_bits(split.bits(), before) == (at is not None and seed == 1)
