"""Weights that somebody else writes to between steps: `step` adopts what changed, no more."""

from __future__ import annotations

import copy
import warnings

import mpcore
import mpcore.migration
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine, engine_cases
from mpcore_testing.snapshots import snapshot
from mpcore_testing.weight_edits import (
    ADOPTED,
    BRAIN,
    EDITS,
    HALF,
    INNERS,
    Training,
    equal_after_adoption,
    expected_masters,
    one_row,
)

# ------------------------------------------------------------------ what is adopted


RULES = ["adopt", "always"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_was_written_becomes_the_master_and_all_else_keeps_its_digits(
    engine: Engine, rule: str, edit: str, steps: int
) -> None:
    training = Training(engine, rule)
    training.step(*range(steps))
    EDITS[edit](training)
    equal_after_adoption(training)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("inner", "engine"), engine_cases(INNERS))
def test_steps_go_on_from_it_as_those_of_an_optimizer_with_such_masters(
    engine: Engine, inner: str, edit: str, rule: str
) -> None:
    """The other one gets masters that nobody of us has compared, by its state."""
    training, twin = Training(engine, rule, inner), Training(engine, inner=inner)
    for one in (training, twin):
        one.step(1, 2)
        torch.manual_seed(1)
        EDITS[edit](one)
    state = copy.deepcopy(twin.optimizer.state_dict())
    for number, master in enumerate(expected_masters(twin)):
        state["state"][number]["master"] = master
    twin.optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.step(3, 4)
    twin.step(3, 4)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))
    assert training.optimizer.check_masters() == []


@pytest.mark.parametrize("place", ["before", "scaled", "backward", "clip", "unscale", "accumulate"])
def test_it_does_not_matter_where_between_two_steps_it_is_written(
    engine: Engine, place: str
) -> None:
    """Gradients are given, so that they do not depend on when it happens."""

    def run(chosen: str | None) -> Training:
        training = Training(engine)
        training.step(1)
        for name in ("before", "scaled", "backward", "clip", "unscale", "accumulate"):
            if name == chosen or (chosen is None and name == "before"):
                torch.manual_seed(2)
                one_row(training)
            if name == "scaled":
                training.optimizer.scale(torch.ones(()))
            if name == "backward":
                for param in training.optimizer._params():
                    param.grad = torch.full_like(param, 0.5)
            if place == name == "clip":
                training.optimizer.clip_grad_norm_(1.0)
            if place == name == "unscale":
                training.optimizer.unscale_()
            if place == name == "accumulate":
                training.optimizer.accumulate()
        with pytest.warns(UserWarning, match=ADOPTED):
            training.optimizer.step()
        training.optimizer.zero_grad()
        return training

    order = ["before", "scaled", "backward", "clip", "unscale", "accumulate"]
    later = order[min(order.index(place) + 1, 5)]  # after the call of the same name
    runs = [run(None), run(place), run(later)]
    assert same_bits(snapshot(runs[1].optimizer), snapshot(runs[0].optimizer))
    assert same_bits(snapshot(runs[2].optimizer), snapshot(runs[0].optimizer))


def test_only_step_adopts(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    monitor = mpcore.Monitor(training.optimizer, every=1)
    kept = [master.detach().clone() for master in training.masters()]
    one_row(training)
    optimizer = training.optimizer
    exact = optimizer.state_dict()["state"][0]["master"]
    assert optimizer.check_masters() == ["low.weight"]
    mpcore.migration.float32_state_dict(training.model, optimizer)
    optimizer.backward(training.loss(2))
    optimizer.clip_grad_norm_(1.0)
    optimizer.unscale_()
    optimizer.grads()
    assert monitor.report() is None
    assert same_bits([master.detach() for master in training.masters()], kept)
    assert same_bits(exact, kept[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_gradients_adopts_too(engine: Engine, rule: str) -> None:
    training = Training(engine, rule)
    training.step(1)
    one_row(training)
    expected = expected_masters(training)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    assert same_bits([m.detach() for m in training.masters()], expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_without_a_gradient_in_this_step_is_adopted_too(engine: Engine, rule: str) -> None:
    training = Training(engine, rule, "SGD")
    training.step(1)
    one_row(training)
    expected = expected_masters(training)
    training.optimizer.scale(torch.ones(()))
    training.brain.bias.grad = torch.ones_like(training.brain.bias)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    masters = training.masters()
    assert same_bits([m.detach() for m in masters[:3]], expected[:3])
    assert training.optimizer.check_masters() == []


def test_clamped_masters_are_no_edit(engine: Engine) -> None:
    param = nn.Parameter(torch.full((2,), 65504.0).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.NoLossScale())
    for _ in range(2):
        optimizer.backward(-100 * param.float().sum())
        with torch.no_grad():
            param.copy_(param.clone())
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[param]["master"].tolist() == [65704.0, 65704.0]


# ------------------------------------------------------------------ averages, masks, bounds


@pytest.mark.parametrize("way", ["copies", "AveragedModel"])
def test_averages_swapped_in_and_out_leave_exact_masters_and_no_warning(
    engine: Engine, way: str
) -> None:
    training, twin = Training(engine), Training(engine)
    average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for seed in range(5):
        for one in (training, twin):
            one.step(seed)
        average.update_parameters(training.model)
        kept = [param.detach().clone() for param in training.model.parameters()]
        if way == "copies":
            values = [value * 0.5 for value in kept]
        else:
            values = list(average.module.parameters())
        with torch.no_grad():
            for param, value in zip(training.model.parameters(), values, strict=True):
                param.copy_(value)
        training.loss(7).item()  # an evaluation
        saved = training.optimizer.state_dict()["state"]
        assert same_bits(saved[0]["master"], twin.optimizer.state_dict()["state"][0]["master"])
        with torch.no_grad():
            for param, value in zip(training.model.parameters(), kept, strict=True):
                param.copy_(value)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_clipped_weights_stay_at_their_bound_as_in_float32(
    engine: Engine, dtype: torch.dtype
) -> None:
    """A critic's weights: what lies inside moves by less than half a last place a step."""
    bound, lr, steps = 0.5, 2.0**-14, 200
    start = torch.tensor([0.5, 0.4375, -0.5, 0.25])
    slope = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    param, plain = nn.Parameter(start.to(dtype)), start.clone()
    optimizer = engine.wrap(torch.optim.SGD([param], lr=lr), mpcore.NoLossScale())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.backward((param.float() * slope).sum())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                param.clamp_(-bound, bound)
            plain = (plain - lr * slope).clamp(-bound, bound)
    master = optimizer.state[param]["master"]
    assert torch.equal(master[[1, 3]], plain[[1, 3]])  # never at the bound: bit for bit
    assert (param.detach().float().abs() <= bound).all()
    # a master may be beyond the bound by half a last place of its weight, and by the last step,
    # whose clipping the next one adopts
    assert (master - plain).abs().max() <= bound * torch.finfo(dtype).eps / 2 + lr
    assert len(told) <= 1


def test_masks_that_are_put_back_after_each_step_hold(engine: Engine) -> None:
    training = Training(engine)
    mask = torch.tensor([[1, 0, 1, 0]] * 3).half()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in range(6):
            with torch.no_grad():
                training.low.weight.mul_(mask)
            training.step(seed)
    with torch.no_grad():
        training.low.weight.mul_(mask)
    expected = expected_masters(training)
    assert (expected[0][:, 1::2] == 0).all()
    assert (expected[0][:, ::2] != training.low.weight[:, ::2].float()).any()
    assert len(told) == 1  # once, not at every step


def test_torch_prune_trains_what_is_left(engine: Engine) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 2, bias=False)
    prune.random_unstructured(layer, "weight", 0.5)
    optimizer = engine.wrap(torch.optim.SGD(layer.parameters(), lr=0.5), mpcore.NoLossScale())
    mpcore.cast_model(layer, HALF, optimizer)
    before = layer.weight_orig.detach().clone()
    for _ in range(2):
        optimizer.backward(layer(torch.ones(1, 4).half()).float().sum())
        optimizer.step()
        optimizer.zero_grad()
    kept = layer.weight_mask != 0
    assert torch.equal(before[~kept], layer.weight_orig[~kept])
    assert (before[kept] != layer.weight_orig[kept]).all()


def test_tied_weights_are_adopted_once(engine: Engine) -> None:
    table = nn.Embedding(5, 3).half()
    head = nn.Linear(3, 5, bias=False).half()
    head.weight = table.weight
    optimizer = engine.wrap(torch.optim.SGD([table.weight], lr=0.5), mpcore.NoLossScale())
    for row in range(2):
        optimizer.backward(head(table(torch.tensor([row]))).float().sum())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        head.weight[4] = 7.0
    optimizer.backward(table(torch.tensor([0])).float().sum())
    with pytest.warns(UserWarning, match="^3 elements of group 0, parameter 0"):
        optimizer.step()
    assert optimizer.state[table.weight]["master"][4].tolist() == [7.0] * 3


def test_a_step_in_the_middle_of_sums_adopts(engine: Engine) -> None:
    training, twin = Training(engine), Training(engine)
    for one in (training, twin):
        one.step(1)
        one.backward(2)
        one.optimizer.accumulate()
    one_row(training)
    with torch.no_grad():
        twin.low.weight.copy_(training.low.weight)
    twin.optimizer.sync_masters_from_model()
    for one in (training, twin):
        one.backward(3)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    twin.optimizer.step()
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


def test_weights_loaded_after_the_optimizer_was_made_are_what_is_stepped_from(
    engine: Engine,
) -> None:
    """Was an error once, whose remedy everybody needed: now the step does what the remedy did."""
    weight = nn.Parameter(torch.linspace(-1, 1, 4).half())
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1e-3), mpcore.NoLossScale())
    optimizer.adopt_masters([(weight, torch.linspace(-1, 1, 4))])
    with torch.no_grad():
        weight.copy_(torch.full((4,), 5.0))
    optimizer.backward(weight.float().sum())
    with pytest.warns(UserWarning, match="were written to by others"):
        optimizer.step()
    master = optimizer.state[weight]["master"]
    assert torch.equal(master, torch.full((4,), 5.0) - 1e-3)
