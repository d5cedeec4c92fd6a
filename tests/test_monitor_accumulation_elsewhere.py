"""`mpcore.Monitor` over several passes in closures, resumed runs, other scalers and optimizers."""

from __future__ import annotations

import copy
import math

import mpcore
import pytest
import torch
from mpcore.monitoring.pass_losses import PassLosses
from torch import Tensor, nn

from mpcore_testing.accumulating import Training, noise
from mpcore_testing.engines import Engine


def test_a_closure_of_several_passes_counts_its_last_evaluation(engine: Engine) -> None:
    training = Training(Engine(engine.backend, "general"))

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        training.micro_batch(noise(0), loss=1.0)
        training.micro_batch(noise(1), loss=2.0)
        return torch.tensor(3.0)

    training.optimizer.step(closure)
    assert (training.reading.loss, training.reading.largest_loss) == (3.0, 2.0)
    assert training.reading.findings[0].passes == 2


@pytest.mark.parametrize("clears", ["optimizer", "model"])
@pytest.mark.parametrize("bad", [False, True])
def test_evaluations_of_a_closure_do_not_add_up(engine: Engine, clears: str, bad: bool) -> None:
    weight = nn.Parameter(torch.full((8,), 2.0).half())
    optimizer = Engine(engine.backend, "general").wrap(
        torch.optim.LBFGS([weight], lr=0.1, max_iter=4), mpcore.StaticLossScale(8.0)
    )
    monitor = mpcore.Monitor(optimizer, every=1)
    losses: list[float] = []

    def closure() -> Tensor:
        if clears == "optimizer":
            optimizer.zero_grad()
        else:
            weight.grad = None  # as model.zero_grad() does
        loss = (weight.float() - 0.5).square().sum()
        if bad and not losses:
            loss = loss * torch.inf
        losses.append(loss.item())
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    assert monitor.reading is not None
    assert monitor.reading.passes == 1
    if bad:
        report = monitor.report()
        assert report is not None
        assert report.verdict.name == "forward"
        assert monitor.reading.loss == math.inf
    else:
        assert len(losses) > 2
        assert monitor.reading.loss == pytest.approx(losses[-1])


def test_the_two_passes_of_a_sharpness_aware_step_do_not_add_up() -> None:
    history = []
    for second in (2.0, 3.0):
        losses = PassLosses(torch.device("cpu"))
        losses.see(torch.tensor(1.0), "")
        losses.note_collected()
        assert losses.see(torch.tensor(second), "")
        history += losses.taken(None)
    assert [(name, float(loss)) for name, loss in history if loss is not None] == [
        ("", 2.0),
        ("", 3.0),
    ]


def test_a_resumed_accumulation_has_losses_that_nobody_knows(engine: Engine) -> None:
    first = Training(engine)
    first.micro_batch(noise(0), loss=4.0)
    state = copy.deepcopy(first.optimizer.state_dict())
    second = Training(engine)
    second.optimizer.load_state_dict(state)
    report = second.step([1.0], bad=0)
    assert report is not None
    assert report.losses == (None, 1.0)
    assert (report.loss, second.reading.passes) == (None, 2)
    assert [one.micro_batch for one in report.passes] == [1]
    assert "in micro-batch 1" in report.one_line()


@pytest.mark.parametrize("make", [torch.amp.GradScaler, mpcore.GradScaler])
def test_only_torchs_scaler_leaves_the_loss_to_who_knows_it(engine: Engine, make: type) -> None:
    half = nn.Parameter(torch.ones(4).half())
    optimizer = engine.wrap(torch.optim.SGD([half], lr=0.1), mpcore.NoLossScale())
    monitor = mpcore.Monitor(optimizer, every=1)
    scaler = make("cpu", init_scale=8.0)
    readings = []
    for told in (False, True):
        losses = [half.float().sum(), half.float().square().sum()]
        for loss in losses:
            if told:
                monitor.see_loss(loss)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        readings.append((monitor.reading, sum(loss.item() for loss in losses)))
    assert readings[0][0] is not None
    if make is mpcore.GradScaler:
        assert (readings[0][0].loss, readings[0][0].passes) == (pytest.approx(readings[0][1]), 2)
    else:
        assert (readings[0][0].loss, readings[0][0].passes) == (None, 1)
    assert readings[1][0] is not None
    assert (readings[1][0].loss, readings[1][0].passes) == (pytest.approx(readings[1][1]), 2)


def test_optimizers_of_one_loss_each_see_their_own(engine: Engine) -> None:
    trainings = [Training(engine), Training(engine)]
    for number, training in enumerate(trainings):
        training.micro_batch(noise(number), loss=float(number + 1))
    for training in trainings:
        training.micro_batch(noise(5), loss=8.0)
        training.optimizer.step()
    assert [training.reading.loss for training in trainings] == [9.0, 10.0]


def test_passes_with_other_parameters_are_counted_by_parameter() -> None:
    """A layer that takes part in one pass of two."""
    params = [nn.Parameter(torch.ones(4).half()) for _ in range(2)]
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.1))
    monitor = mpcore.Monitor(optimizer, every=1)
    optimizer.backward((params[0].float() * 2.0**-9 + params[1].float() * 2.0**-4).sum())
    optimizer.accumulate()
    optimizer.backward((params[0].float() * 2.0**-12).sum())
    optimizer.accumulate()
    optimizer.step()
    assert monitor.reading is not None
    both, once = monitor.reading.findings
    assert (both.passes, once.passes) == (2, 1)
    assert both.histogram is not None
    assert {at - 24: n for at, n in enumerate(both.histogram) if n} == {7: 4, 4: 4}
    assert once.headroom_bits == pytest.approx(math.log2(65504 / 2.0**12))
