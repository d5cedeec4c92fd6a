"""What averages, restores and first makes the state of compact moments and bare weights."""

import mpcore
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import swa_utils

from mpcore_testing.bits import same_bits
from mpcore_testing.compact import ADAMW, BUILDS, ENGINES, compact, weights
from mpcore_testing.stored import SCALE

KEPT = pytest.mark.parametrize("moments", ["bfloat16", "int8"])
MASTERS = pytest.mark.parametrize("masters", ["float32", "split", "none"])


@KEPT
@MASTERS
@ENGINES
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_first_step_over_zeros_makes_state_and_moves_nothing(name, engine, masters, moments):
    one, other = (compact(engine, BUILDS[name], masters=masters, moments=moments) for _ in range(2))
    before = [param.detach().clone() for param in one.params]
    for param in one.params:
        param.grad = torch.zeros_like(param)
    one.optimizer.step()
    assert same_bits([param.detach() for param in one.params], before)
    assert one.optimizer.steps == 0
    one.optimizer.zero_grad()
    for each in (one, other):
        for seed in range(2):
            each.step(seed)
    assert same_bits(one.bits(), other.bits())


@KEPT
@ENGINES
def test_checkpoint_tools_find_all_of_the_state(engine, moments):
    model = nn.Linear(300, 4).bfloat16()
    optimizer = engine.wrap(ADAMW(model.parameters()), masters="none", moments=moments)
    found = get_optimizer_state_dict(model, optimizer)["state"]["weight"]
    assert {name for name in found if name != "step"} == {"master", "exp_avg", "exp_avg_sq"}
    assert all(value.dtype == torch.float32 for value in found.values())


@KEPT
@MASTERS
@ENGINES
def test_an_average_that_is_swapped_in_leaves_no_trace(engine, masters, moments):
    one = compact(engine, masters=masters, moments=moments)
    model = nn.ParameterList(one.params)
    ema = swa_utils.get_ema_multi_avg_fn(0.5)
    average = mpcore.AveragedModel(model, one.optimizer, multi_avg_fn=ema)
    for seed in range(3):
        one.step(seed)
        average.update_parameters(model)
    before = one.bits()
    with average.applied_to(model):
        assert not same_bits(one.bits()[0], before[0])
    assert same_bits(one.bits(), before)


@KEPT
@MASTERS
@ENGINES
def test_losses_of_their_own(engine, masters, moments):
    ours = []
    for _ in range(2):
        params = weights(torch.bfloat16)
        optimizer = engine.wrap(ADAMW(params), SCALE, masters=masters, moments=moments)
        other = optimizer.add_loss("other", mpcore.StaticLossScale(4.0))
        for _ in range(3):
            optimizer.backward(params[0].float().square().sum())
            other.backward(params[0].float().sin().sum())
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.state[params[0]]["exp_avg"].dtype != torch.float32
        ours.append([param.detach().clone() for param in params])
    assert same_bits(*ours)
    assert not torch.equal(ours[0][0], weights(torch.bfloat16)[0])


@KEPT
@MASTERS
@ENGINES
def test_a_step_that_raises_leaves_the_one_before(engine, masters, moments):
    one, other = (compact(engine, masters=masters, moments=moments) for _ in range(2))
    for each in (one, other):
        each.step(0)
    one.give(1)
    grad = one.params[1].grad
    one.params[1].grad = torch.zeros(7, dtype=torch.bfloat16).to_sparse()
    before = one.bits()
    with pytest.raises(mpcore.ArgumentError, match="expected a dense gradient"):
        one.optimizer.step()
    assert same_bits(one.bits(), before)
    one.params[1].grad = grad
    one.optimizer.step()
    one.optimizer.zero_grad()
    other.step(1)
    assert same_bits(one.bits(), other.bits())


@KEPT
@ENGINES
def test_memory_that_moves_is_followed(engine, moments):
    one, other = (compact(engine, moments=moments) for _ in range(2))
    for each in (one, other):
        each.step(0)
    for state in map(one.optimizer.state.get, one.params):
        for value in state.values():
            if torch.is_tensor(value) and value.dim():
                value.data = value.data.clone()
    for each in (one, other):
        each.step(1)
    assert same_bits(one.bits(), other.bits())


@KEPT
@ENGINES
def test_a_parameter_that_goes_to_another_place_keeps_its_bits(engine, moments):
    one, other = (compact(engine, moments=moments) for _ in range(2))
    for each in (one, other):
        each.step(0)
    (group,) = one.optimizer.param_groups
    group["params"][:] = group["params"][::-1]
    for each in (one, other):
        each.step(1)
    assert same_bits(one.bits(), other.bits())


@KEPT
@MASTERS
@ENGINES
def test_empty_parameters_change_nothing_of_the_others(engine, masters, moments):
    full, empty = [(4, 300), (), (1, 1)], [(0, 300), (0,)]
    found = []
    for shapes in (full, [*full, *empty]):
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        params = [nn.Parameter(value.clone()) for value in values]
        optimizer = engine.wrap(ADAMW(params), SCALE, masters=masters, moments=moments)
        for step in range(4):
            optimizer.scale(torch.zeros(()))
            for param in params:
                param.grad = torch.full_like(param, torch.inf if step == 0 else 2.0**-step)
            optimizer.step()
        found.append([param.detach() for param in params[: len(full)]])
        assert not torch.equal(params[0], values[0])
    assert same_bits(*found)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
@MASTERS
@ENGINES
def test_two_optimizers_of_one_weight_have_one_master(engine, masters, moments):
    def trained(masters, moments):
        weight = nn.Parameter(torch.linspace(-3, 3, 8 * 128).view(8, 128).bfloat16())
        both = [
            engine.wrap(build([weight]), SCALE, masters=masters, moments=moments)
            for build in (BUILDS["AdamW"], BUILDS["SGD"])
        ]
        draw = torch.Generator().manual_seed(0)
        found = []
        for step in range(6):
            optimizer = both[step % 2]
            factor = torch.inf if step == 3 else 1.0
            drawn = torch.randn(weight.shape, generator=draw)
            optimizer.backward((weight.float() * drawn * factor).sum())
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.last_step.skipped == (step == 3)
            if step and masters != "none":  # made in the first step
                one, other = (each.float32_state(weight)["master"] for each in both)
                assert same_bits([one], [other])
            found.append(weight.detach().clone())
        assert same_bits([found[3]], [found[2]])
        return found

    mine, again = (trained(masters, moments) for _ in range(2))
    assert same_bits(mine, again)
    if masters == "split" and moments == "float32":
        assert same_bits(mine, trained("float32", "float32"))
