"""Rule "always" on the fused path: the update adopts, and what it refuses is told afterwards."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.masters import weight_edits
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.snapshots import snapshot
from mpcore_testing.weight_edits import ADOPTED, Training

BAD = [torch.nan, torch.inf, -torch.inf]
FUSED = pytest.mark.parametrize("engine", [e for e in ENGINES if e.fused], ids=str)


def spoil(training: Training, bad: float, *, given: float) -> None:
    """Gradients of this value, and a number that is not finite behind them."""
    training.optimizer.scale(torch.ones(()))
    for param in training.optimizer._params():
        param.grad = torch.full_like(param, given)
    training.brain.weight.data[1, 2] = bad


def trained(engine: Engine) -> tuple[Training, Training, float]:
    """Two that are alike after a step, and the number that `spoil` is going to overwrite."""
    training, twin = Training(engine, "always"), Training(engine, "always")
    for one in (training, twin):
        one.step(1)
    return training, twin, twin.brain.weight[1, 2].item()


@pytest.mark.parametrize("bad", BAD)
@FUSED
def test_a_step_that_refuses_numbers_that_are_not_finite_is_whole_and_overwrites_them(
    engine: Engine, bad: float
) -> None:
    training, twin, kept = trained(engine)
    spoil(training, bad, given=1.0)
    spoil(twin, kept, given=1.0)
    with pytest.raises(mpcore.StageError, match=r"got 1 that are not in brain\.we.*overwritten"):
        training.optimizer.step()
    twin.optimizer.step()
    for one in (training, twin):
        assert one.optimizer.check_masters() == []
        one.optimizer.zero_grad()
        one.step(2, 3)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


@pytest.mark.parametrize("bad", BAD)
@FUSED
def test_a_skipped_step_that_refuses_them_has_counted_and_leaves_them_to_be_mended(
    engine: Engine, bad: float
) -> None:
    training, twin, kept = trained(engine)
    for skipped in (1, 2):
        spoil(training, bad, given=torch.inf)
        spoil(twin, kept, given=torch.inf)
        with pytest.raises(mpcore.StageError, match=r"their masters are as before\. Write finite"):
            training.optimizer.step()
        twin.optimizer.step()
        assert training.optimizer.last_step is not None
        assert training.optimizer.last_step.skipped
        assert training.optimizer.skipped_steps == skipped
        assert training.optimizer.check_masters() == ["brain.weight"]
    with torch.no_grad():
        training.brain.weight[1, 2] = kept
    for one in (training, twin):
        one.optimizer.zero_grad()
        one.step(2, 3)
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))


@FUSED
def test_a_loss_scale_that_gives_up_does_not_hide_what_was_refused(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).half())
    scale = mpcore.DynamicLossScale(init=1.0, min_scale=1.0, at_min="raise")
    optimizer = engine.wrap(torch.optim.SGD([param], lr=0.5), scale, "always")
    optimizer.backward(param.float().sum())
    optimizer.step()
    optimizer.zero_grad()
    param.data[1] = torch.nan
    optimizer.backward(param.float().sum() * torch.inf)
    with pytest.raises(mpcore.LossScaleError):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(torch.tensor(1.0).half() * param[0])
    with pytest.raises(mpcore.StageError, match="their masters are as before"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped


class Calls:
    """Counts the parameters that passes and updates look at."""

    def __init__(self, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[int] = []
        self.updates: list[int] = []
        module = optimizer._module
        adopt, update = module.adopt_, module.update_

        def adopt_(weights: Any, *rest: Any) -> None:
            self.passes.append(len(weights))
            adopt(weights, *rest)

        def update_(*args: Any, edits: Tensor | None = None, **options: Any) -> None:
            self.updates.append(-1 if edits is None else len(edits))
            update(*args, edits=edits, **options)

        monkeypatch.setattr(module, "adopt_", adopt_)
        monkeypatch.setattr(module, "update_", update_)


@FUSED
def test_what_an_update_reads_is_in_no_pass(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, usual = Training(engine, "always", "SGD"), Training(engine)
    calls = Calls(training.optimizer, monkeypatch)
    training.step(1, 2)
    assert (calls.passes, calls.updates) == ([], [4, 4])
    training.optimizer.scale(torch.ones(()))
    training.brain.bias.grad = torch.ones_like(training.brain.bias)
    training.optimizer.step()
    assert (calls.passes, calls.updates) == ([3], [4, 4, 1])
    usual.step(1)
    assert calls.updates[3:] == [-1]


@FUSED
def test_a_closure_is_followed_by_an_update_that_adopts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, twin = Training(engine, "always"), Training(engine)
    for one in (training, twin):
        one.step(1)
        one.low.weight.data[0] = 2.0
    with torch.no_grad():
        twin.low.weight.add_(0)  # which a counter tells
    calls = Calls(training.optimizer, monkeypatch)

    def closure_of(one: Training) -> Any:
        def closure() -> Tensor:
            one.optimizer.zero_grad()
            loss = one.loss(2)
            one.optimizer.backward(loss)
            return loss

        return closure

    with pytest.warns(UserWarning, match=f"^4 {ADOPTED}"):
        training.optimizer.step(closure_of(training))
    assert (calls.passes, calls.updates) == ([], [4])
    with pytest.warns(UserWarning, match=f"^4 {ADOPTED}"):
        twin.optimizer.step(closure_of(twin))
    assert same_bits(snapshot(training.optimizer), snapshot(twin.optimizer))
    training.optimizer.zero_grad()
    training.brain.bias.data.fill_(9.0)
    with pytest.warns(UserWarning, match=f"^2 {ADOPTED}"):  # no gradients, no update
        training.optimizer.step(lambda: torch.zeros(()))
    assert training.masters()[3].tolist() == [9.0, 9.0]


@FUSED
def test_a_master_that_two_hold_is_adopted_by_the_first_that_steps(engine: Engine) -> None:
    param = nn.Parameter(torch.ones(3).half())
    both = [
        engine.wrap(torch.optim.SGD([param], lr=0.5), mpcore.NoLossScale(), "always")
        for _ in range(2)
    ]
    for optimizer in both:
        optimizer.backward(param.float().sum())
        optimizer.step()
        optimizer.zero_grad()
    param.data[1] = 7.0
    both[0].backward(param.float().sum())
    with pytest.warns(UserWarning, match=f"^1 {ADOPTED}"):
        both[0].step()
    both[0].zero_grad()
    both[1].backward(param.float().sum())
    both[1].step()
    assert both[1].state[param]["master"].tolist() == [-1.0, 6.0, -1.0]


class Late:
    """A copy to the host that arrives when it was asked for some times, in the step after next."""

    def __init__(self, tensor: Tensor) -> None:
        self.values, self._asked = tensor.clone(), 0

    def has_arrived(self) -> bool:
        self._asked += 1
        return self._asked > 4


@FUSED
@pytest.mark.parametrize("changes", [False, True])
def test_late_news_come_in_a_later_step_also_if_other_parameters_are_updated_by_then(
    engine: Engine, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_edits, "comes_late", lambda device: True)
    monkeypatch.setattr(weight_edits, "HostCopy", Late)
    training, twin = Training(engine, "always", "SGD"), Training(engine, inner="SGD")
    for one in (training, twin):
        one.step(1)
    spoil(training, torch.nan, given=1.0)
    spoil(twin, twin.brain.weight[1, 2].item(), given=1.0)
    told = []
    for number in range(6):
        for one in (training, twin):
            if number and not changes:
                one.backward(number)
            elif number:
                one.optimizer.scale(torch.ones(()))
                only = one.low.bias if number % 2 else one.brain.bias
                only.grad = torch.ones_like(only)
        try:
            training.optimizer.step()
        except mpcore.StageError as error:
            told.append((number, str(error)))
        twin.optimizer.step()
        for one in (training, twin):
            one.optimizer.zero_grad()
    ((number, message),) = told
    assert number > 1
    assert "got 1 that are not in brain.weight" in message
    assert "has overwritten them" in message
