"""Weights that somebody else writes to: closures, what is refused, the other rules, a resume."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mpcore
import mpcore.migration
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed import fake_pg

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot
from mpcore_testing.weight_edits import (
    ADOPTED,
    Training,
    expected_masters,
    one_row,
)

# ------------------------------------------------------------------ closures


def test_what_a_closure_writes_is_adopted_at_each_evaluation(engine: Engine) -> None:
    """As in float32, where LBFGS goes on from what the closure left."""
    if engine.fused:
        pytest.skip("LBFGS has no fused update")
    starts = torch.tensor([2.0, -3.0, 0.25])
    param, plain = nn.Parameter(starts.half()), nn.Parameter(starts.clone())
    ours = engine.wrap(torch.optim.LBFGS([param], lr=0.25, max_iter=4), mpcore.NoLossScale())
    theirs = torch.optim.LBFGS([plain], lr=0.25, max_iter=4)

    def closure_over(tensor: Tensor, optimizer: Any, backward: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            with torch.no_grad():
                tensor[1].clamp_(min=-1.0)
            optimizer.zero_grad()
            loss = (tensor.float() - 0.25).square().sum()
            backward(loss)
            return loss

        return closure

    with pytest.warns(UserWarning, match="^1 elements of"):
        ours.step(closure_over(param, ours, ours.backward))
    ours.step(closure_over(param, ours, ours.backward))
    for _ in range(2):
        theirs.step(closure_over(plain, theirs, Tensor.backward))
    assert (ours.state[param]["master"] - plain).abs().max() < 2e-3
    assert ours.check_masters() == []


@pytest.mark.parametrize("rule", ["adopt", "always"])
def test_an_edit_before_a_step_with_a_closure_that_overflows_is_adopted(
    engine: Engine, rule: str
) -> None:
    training = Training(engine, rule)
    training.step(1)
    one_row(training)
    expected = expected_masters(training)

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss(2, torch.inf)
        training.optimizer.backward(loss)
        return loss

    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step(closure)
    assert training.optimizer.last_step is not None
    assert training.optimizer.last_step.skipped
    assert same_bits([m.detach() for m in training.masters()], expected)
    assert training.optimizer.check_masters() == []


# ------------------------------------------------------------------ what is refused


BAD = [torch.nan, torch.inf, -torch.inf]
#: the others hear of it from the update: test_weight_edits_in_updates.py
LOOKS_BEFORE = [("adopt", e) for e in ENGINES] + [("always", e) for e in ENGINES if not e.fused]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("rule", "engine"), LOOKS_BEFORE, ids=str)
def test_numbers_that_are_not_finite_are_refused_until_they_are_mended(
    engine: Engine, rule: str, bad: float
) -> None:
    training = Training(engine, rule)
    training.step(1)
    kept = training.masters()[2].detach().clone()
    with torch.no_grad():
        training.brain.weight[1, 2] = bad
    training.optimizer.scale(torch.ones(()))
    for param in training.optimizer._params():
        param.grad = torch.ones_like(param)
    before = snapshot(training.optimizer)
    for _ in range(2):
        with pytest.raises(mpcore.StageError, match=r"finite .* got 1 that are not in brain\.wei"):
            training.optimizer.step()
        assert same_bits(snapshot(training.optimizer), before)
    with torch.no_grad():
        training.brain.weight[1, 2] = 3.0
    with pytest.warns(UserWarning, match=r"^1 elements of brain\.weight"):
        training.optimizer.step()
    kept[1, 2] = 3.0
    assert (training.masters()[2] - kept).abs().max() < 0.05  # a step further on
    assert training.optimizer.check_masters() == []


def test_numbers_that_are_not_finite_are_taken_by_whom_asks_for_it(engine: Engine) -> None:
    training = Training(engine)
    training.step(1)
    with torch.no_grad():
        training.brain.weight[1, 2] = torch.inf
    training.optimizer.sync_masters_from_model()
    assert training.masters()[2][1, 2] == torch.inf
    assert training.optimizer.check_masters() == []


# ------------------------------------------------------------------ the other rules


def test_always_sees_what_no_counter_tells(engine: Engine) -> None:
    """Weight clipping as WGAN's code has it."""
    adopts, always = Training(engine), Training(engine, "always")
    for one in (adopts, always):
        one.step(1)
        for param in one.halves():
            param.data.clamp_(-0.2, 0.2)
    expected = expected_masters(always)
    always.optimizer.backward(always.loss(2, torch.inf))
    with pytest.warns(UserWarning, match=ADOPTED):
        always.optimizer.step()
    always.optimizer.zero_grad()
    assert same_bits([m.detach() for m in always.masters()], expected)
    adopts.optimizer.backward(adopts.loss(2, torch.inf))
    adopts.optimizer.step()
    assert adopts.optimizer.check_masters() != []


def test_always_sees_what_numpy_writes(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).half())
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale(), "always")
    optimizer.backward(param.float().sum())
    optimizer.step()
    optimizer.zero_grad()
    param.detach().numpy()[1] = 8.0
    optimizer.backward(param.float().sum())
    with pytest.warns(UserWarning, match="^1 elements of"):
        optimizer.step()
    assert optimizer.state[param]["master"].tolist() == [0.0, 7.5, 0.0]


@pytest.mark.parametrize("rule", ["adopt", "always", "raise"])
def test_the_rule_goes_with_copies(engine: Engine, rule: str) -> None:
    training = Training(engine, rule)
    training.step(1)
    other = copy.deepcopy(training)
    assert other.optimizer.on_weight_edit == rule
    with torch.no_grad():
        other.low.weight[0, 0] = 9.0
    before = [m.detach().clone() for m in training.masters()]
    if rule == "raise":
        with pytest.raises(mpcore.StageError, match="they were written to"):
            other.step(2)
    else:
        with pytest.warns(UserWarning, match=ADOPTED):
            other.step(2)
    assert same_bits([m.detach() for m in training.masters()], before)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """As the first of two, of which the other one never answers: nothing is sent."""
    store = fake_pg.FakeStore()
    distributed.init_process_group("fake", rank=0, world_size=2, store=store)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore:this process is one of several ranks")
def test_ranks_do_not_start_from_masters_that_differ(engine: Engine) -> None:
    """Whose weights were broadcast would keep digits that the other ranks never had."""
    training = Training(engine)
    one_row(training)
    training.backward(0)
    with pytest.raises(mpcore.StageError, match=r"sync_masters_from_model\(exact=True\) on every"):
        training.optimizer.step()
    training.optimizer.sync_masters_from_model(exact=True)
    training.optimizer.step()
    training.optimizer.zero_grad()
    one_row(training)
    with pytest.warns(UserWarning, match=ADOPTED):
        training.step(1)


def test_an_unknown_rule_is_refused(engine: Engine) -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2).half())], lr=0.1)
    with pytest.raises(mpcore.ArgumentError, match="on_weight_edit: expected one of adopt, always"):
        engine.wrap(inner, mpcore.NoLossScale(), "overwrite")
    engine.wrap(inner, mpcore.NoLossScale())


def test_float32_weights_have_nothing_to_adopt(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale(), "always")
    for _ in range(2):
        optimizer.backward(param.sum())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            param.add_(1.0)
    assert param.tolist() == [2.0] * 3


# ------------------------------------------------------------------ asked for


@pytest.mark.parametrize("exact", [False, True])
def test_masters_taken_from_the_model_keep_their_digits_unless_told_otherwise(
    engine: Engine, exact: bool
) -> None:
    training = Training(engine)
    training.step(1)
    training.low.weight.data[0, 0] = 5.0
    expected = [p.detach().float() for p in training.halves()]
    kept = expected_masters(training)
    assert not same_bits(kept, expected)
    training.optimizer.sync_masters_from_model(exact=exact)
    found = [master.detach() for master in training.masters()]
    assert same_bits(found, expected if exact else kept)
    assert training.optimizer.check_masters() == []
    training.step(2)


# ------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize("adopted", [False, True])
def test_a_run_resumed_around_an_edit_goes_on_with_the_same_bits(
    engine: Engine, adopted: bool
) -> None:
    training, other = Training(engine), Training(engine)
    training.step(1)
    if adopted:
        one_row(training)
        with pytest.warns(UserWarning, match=ADOPTED):
            training.step(2)
    saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    for one in (training, other):
        one.step(3)
        torch.manual_seed(5)
        one_row(one)
    for one in (training, other):
        # what `training` has said once it does not say again
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*" + ADOPTED)
            one.step(4)
    assert same_bits(snapshot(other.optimizer), snapshot(training.optimizer))
