"""Weights that do not go with their masters where that is an error.

That is with `on_weight_edit="raise"`, and for masters that came without their weights. See
`test_weight_edits.py` for the rule by default.
"""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import mpcore.migration
import pytest
import torch
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import FUSED, Engine
from mpcore_testing.snapshots import snapshot
from mpcore_testing.syncs import ScalarReads

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
STALE = r"step\(\): expected weights that are their rounded masters, got others in "


class Training:
    def __init__(self, engine: Engine, on_weight_edit: str = "raise") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        inner = torch.optim.AdamW(self.model.named_parameters(), lr=0.1)
        self.optimizer = engine.wrap(inner, mpcore.StaticLossScale(2.0**6), on_weight_edit)
        self.model = mpcore.cast_model(self.model, HALF, self.optimizer)

    def backward(self, seed: int) -> None:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        self.optimizer.backward(self.model(inputs.half()).float().square().mean())

    def step(self, *seeds: int) -> None:
        for seed in seeds:
            self.backward(seed)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]

    def expect_fresh(self) -> None:
        assert self.optimizer.check_masters() == []


def test_weights_loaded_after_training_began_are_noticed(engine: Engine) -> None:
    training = Training(engine)
    training.step(1, 2)
    other = Training(engine)
    other.step(3, 4, 5)
    training.model.load_state_dict(other.model.state_dict())
    before = snapshot(training.optimizer)
    with pytest.raises(mpcore.StageError, match=STALE + r"0\.weight, .* and 1 more"):
        training.step(6)
    training.optimizer.zero_grad()
    assert same_bits(snapshot(training.optimizer), before)
    assert training.optimizer.check_masters() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    training.optimizer.sync_masters_from_model()
    training.expect_fresh()
    training.step(6)
    training.expect_fresh()


@pytest.mark.parametrize("model_first", [False, True])
def test_model_and_optimizer_may_be_loaded_in_either_order(
    engine: Engine, model_first: bool
) -> None:
    source, target = Training(engine), Training(engine)
    source.step(1, 2)
    target.step(5)
    loads = [
        lambda: target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict())),
        lambda: target.model.load_state_dict(source.model.state_dict()),
    ]
    for load in reversed(loads) if model_first else loads:
        load()
    source.step(3, 4)
    target.step(3, 4)
    assert same_bits(snapshot(target.optimizer), snapshot(source.optimizer))


@pytest.mark.parametrize("rule", ["adopt", "always", "raise"])
def test_a_state_without_the_weights_that_go_with_it_is_noticed(engine: Engine, rule: str) -> None:
    source, target = Training(engine), Training(engine, rule)
    source.step(1, 2)
    target.step(5)
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    with pytest.raises(mpcore.StageError, match="was loaded without the model's"):
        target.step(3)
    before = snapshot(target.optimizer)
    calls = [target.optimizer.unscale_, target.optimizer.step]
    calls.append(lambda: target.optimizer.step(lambda: pytest.fail("it was evaluated")))
    for call in calls:
        with pytest.raises(mpcore.StageError, match="was loaded without the model's"):
            call()
    assert same_bits(snapshot(target.optimizer), before)
    target.model.load_state_dict(source.model.state_dict())  # as the message says
    target.optimizer.step()


def test_swapping_averages_in_and_out_changes_nothing(engine: Engine) -> None:
    training, twin = Training(engine), Training(engine)
    for one in (training, twin):
        one.step(1, 2)
    kept = training.weights()
    with torch.no_grad():
        for param in training.model.parameters():
            param.mul_(0.5)
    training.model(torch.ones(1, 4).half())  # an evaluation with the averages
    with torch.no_grad():
        for param, value in zip(training.model.parameters(), kept, strict=True):
            param.copy_(value)
    for one in (training, twin):
        one.step(3, 4)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


@pytest.mark.parametrize("place", ["clip", "unscale", "accumulate", "step"])
def test_an_edit_is_noticed_before_anything_of_the_step_is(engine: Engine, place: str) -> None:
    training = Training(engine)
    training.step(1)
    training.backward(2)
    with torch.no_grad():
        training.model[2].weight[0, 1] += 1
    calls = {
        "clip": lambda: training.optimizer.clip_grad_norm_(1.0),
        "unscale": training.optimizer.unscale_,
        "accumulate": lambda: (training.optimizer.accumulate(), training.optimizer.step()),
        "step": training.optimizer.step,
    }
    with pytest.raises(mpcore.StageError, match=r"got others in 2\.weight: they were written to"):
        calls[place]()
    assert training.optimizer.last_step is not None
    assert training.optimizer.steps == 1
    training.optimizer.zero_grad()
    training.optimizer.sync_masters_from_model()
    training.step(2)
    training.expect_fresh()


def test_an_edit_within_half_a_last_place_is_none(engine: Engine) -> None:
    """Writing the same bits again, which moving a model between devices and back does."""
    training = Training(engine)
    training.step(1)
    masters = [training.optimizer.state[p].get("master") for p in training.model.parameters()]
    with torch.no_grad():
        for param in training.model.parameters():
            param.copy_(param.clone())
    training.step(2)
    after = [training.optimizer.state[p].get("master") for p in training.model.parameters()]
    assert all(a is b for a, b in zip(after, masters, strict=True))


def test_edits_that_bump_no_counter_are_found_by_asking(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    training.model[0].weight.data.add_(1)
    assert training.optimizer.check_masters() == ["0.weight"]
    training.optimizer.sync_masters_from_model()
    training.expect_fresh()


def test_a_nan_in_a_weight_fits_a_nan_in_its_master(engine: Engine) -> None:
    param = nn.Parameter(torch.tensor([1.0, torch.nan]).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.StaticLossScale(4.0))
    for _ in range(3):
        optimizer.scale(torch.ones(()))
        param.grad = torch.ones(2).half()
        with torch.no_grad():
            param.copy_(param.clone())
        optimizer.step()
    assert param[0].item() == 1.0 - 3 * 0.125
    assert optimizer.check_masters() == []


def test_steps_after_closures_skips_and_steps_without_gradients_are_not_suspected(
    engine: Engine,
) -> None:
    training = Training(engine)
    training.step(1)
    training.optimizer.step()
    for bad in (1.0, torch.inf, 1.0):

        def closure(bad: float = bad) -> Any:
            training.optimizer.zero_grad()
            loss = training.model(torch.ones(2, 4).half()).float().sum() * bad
            training.optimizer.backward(loss)
            return loss

        training.optimizer.step(closure)
        training.optimizer.zero_grad()
    training.step(2)
    training.expect_fresh()


@pytest.mark.parametrize("engine", FUSED, ids=str)
def test_looking_costs_no_read_unless_a_weight_was_written_to(engine: Engine) -> None:
    training = Training(engine)
    training.step(1, 2)
    counts = []
    for edits in (False, True):
        training.backward(3)
        if edits:
            with torch.no_grad():
                training.model[0].bias.copy_(training.model[0].bias.clone())
        with ScalarReads() as reads:
            training.optimizer._edits.check("a test")
        counts.append(reads.count)
        training.optimizer.zero_grad()
    assert counts[0] == 0
    assert counts[1] > 0


def test_copies_and_pickles_are_not_suspected(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    other = copy.deepcopy(training)
    for one in (training, other):
        one.step(2)
    assert same_bits(snapshot(other.optimizer), snapshot(training.optimizer))


def test_masters_are_taken_from_a_state_of_higher_precision(engine: Engine) -> None:
    source, target = Training(engine), Training(engine)
    source.step(1, 2)
    target.step(3)
    weights = mpcore.migration.float32_state_dict(source.model, source.optimizer)
    bias = weights.pop("2.bias")
    kept = target.optimizer.state[target.model[2].bias]["master"].clone()
    target.optimizer.sync_masters_from_model(weights)
    for name, param in target.model.named_parameters():
        if "master" in target.optimizer.state[param]:
            expected = weights.get(name, kept)
            assert same_bits(target.optimizer.state[param]["master"].detach(), expected)
    assert not torch.equal(kept, bias)
    target.expect_fresh()
    target.step(4)
    before = snapshot(target.optimizer)
    for bad in (torch.ones(2), torch.ones(3, 4, dtype=torch.int64)):
        weights["0.weight"] = bad
        with pytest.raises(mpcore.ArgumentError, match=r"^weights.*: expected a floating"):
            target.optimizer.sync_masters_from_model(weights)
    assert same_bits(snapshot(target.optimizer), before)
    nameless = engine.wrap(torch.optim.SGD([nn.Parameter(torch.ones(2).half())], lr=0.1))
    with pytest.raises(mpcore.ArgumentError, match="expected an optimizer made from"):
        nameless.sync_masters_from_model({})
