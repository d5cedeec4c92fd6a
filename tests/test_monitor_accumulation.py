"""`mpcore.Monitor` over steps of several backward passes: losses, micro-batches, 16-bit values."""

from __future__ import annotations

import json
import math
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.monitoring.history import Course
from mpcore.monitoring.reading import estimated_flushed
from mpcore.monitoring.records import read_records
from torch import nn

from mpcore_testing.accumulating import SCALE, Training, noise
from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.syncs import ScalarReads


@pytest.mark.parametrize("clip", [False, True])
def test_values_are_counted_where_they_have_16_bits(engine: Engine, clip: bool) -> None:
    training = Training(engine)
    stored = []
    for seed in range(3):
        grad = noise(seed)
        grad[5] = 0.0
        training.micro_batch(grad, added=False)
        assert training.half.grad is not None
        stored.append(training.half.grad.double().numpy())
        training.optimizer.accumulate()
    if clip:
        training.optimizer.clip_grad_norm_(0.1)
    training.optimizer.step()
    sizes = np.abs(np.concatenate(stored))
    half, wide = training.reading.findings
    assert (half.name, half.dtype, half.passes, wide.dtype) == ("half", "float16", 3, "float32")
    assert half.zeros == pytest.approx((sizes == 0).mean())
    small = (sizes > 0) & (sizes < 2.0**-14)
    assert half.subnormal == training.reading.subnormal == pytest.approx(small.mean())
    exponents = np.floor(np.log2(sizes[sizes > 0])).astype(int)
    expected = tuple(int((exponents == e).sum()) for e in range(-24, 16))
    assert half.histogram == training.reading.histogram == expected
    assert half.headroom_bits == pytest.approx(math.log2(65504 / sizes.max()))
    assert training.reading.headroom_bits == half.headroom_bits
    total = np.sum(stored, axis=0) / SCALE
    assert half.norm == pytest.approx(np.linalg.norm(total), rel=1e-5)
    estimate = estimated_flushed(expected)
    assert estimate is not None
    assert training.reading.flushed == pytest.approx(estimate / len(sizes))
    zeros = (sizes == 0).sum() + 3  # of the float32 weight, whose place 5 is 0 as well
    assert training.reading.zeros == pytest.approx(zeros / (3 * 72))


def test_the_losses_of_all_passes_are_told(engine: Engine) -> None:
    training = Training(engine)
    training.step([0.5, -2.0, 1.0])
    reading = training.reading
    assert (reading.loss, reading.largest_loss, reading.passes) == (-0.5, -2.0, 3)
    assert reading.numbers()["largest_loss"] == -2.0
    training.step([0.25])
    assert (training.reading.loss, training.reading.passes) == (0.25, 1)
    course = training.monitor.course()
    assert (course.loss, course.largest_loss) == ((-0.5, 0.25), (-2.0, 0.25))
    courses = [record for record in training.records if isinstance(record, Course)]
    assert [one.largest_loss for one in courses] == [(-2.0,), (0.25,)]


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_the_micro_batch_that_spiked_is_named(engine: Engine, at: int, added: bool) -> None:
    training = Training(engine, every=1000)
    for _ in range(25):
        assert training.step([1.0, 2.0, 1.0, 1.5], added=added) is None
    losses = [1.0, 2.0, 1.0, 1.5]
    losses[at] = 500.0
    report = training.step(losses, bad=at, added=added)
    assert report.verdict.name == "spike"
    assert f"the loss of micro-batch {at} of 4 was 500, usually about 2" in report.verdict.text
    assert report.losses == tuple(losses)
    assert report.loss == sum(losses)
    assert f"the sum of 4, the largest 500 in micro-batch {at}" in str(report)
    if added:
        assert f"overflowed at a loss scale of 1024 in micro-batch {at} of 4" in report.verdict.text
        assert [one.micro_batch for one in report.passes] == [at]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_the_micro_batch_whose_loss_was_not_finite_is_named(
    engine: Engine, at: int, bad: float
) -> None:
    training = Training(engine)
    losses = [1.0, 1.0, 1.0]
    losses[at] = bad
    report = training.step(losses, bad=at)
    assert report.verdict.name == "forward"
    assert report.verdict.text.startswith(f"The loss of micro-batch {at} of 3 was {bad} before")
    assert training.reading.largest_loss == pytest.approx(bad, nan_ok=True)


def test_a_micro_batch_that_overflows_without_a_spike_of_its_loss_is_named(engine: Engine) -> None:
    training = Training(engine, every=1000)
    for _ in range(25):
        training.step([1.0, 1.0, 1.0])
    report = training.step([1.0, 1.0, 1.0], bad=2)
    assert report.verdict.name == "spike"
    assert "in micro-batch 2 of 3" in report.verdict.text
    assert "in micro-batch 2" in report.one_line()


def test_losses_with_scales_of_their_own_are_compared_with_their_own(engine: Engine) -> None:
    half = nn.Parameter(torch.ones(4).half())
    optimizer = engine.wrap(torch.optim.SGD([half], lr=1e-6), mpcore.StaticLossScale(2.0**4))
    large = optimizer.add_loss("large", mpcore.StaticLossScale(2.0**6))
    monitor = mpcore.Monitor(optimizer, every=31)

    def step(factor: float) -> Any:
        optimizer.backward((half.float() * 0.01 * factor).sum())
        large.backward((half.float() * 200).sum() + 1e6)
        optimizer.step()
        optimizer.zero_grad()
        return monitor.report()

    for _ in range(29):
        assert step(1.0) is None
    report = step(1e6)  # a loss of 4e4, less than the other one always is
    assert report.verdict.name == "spike"
    assert (
        "the loss of micro-batch 0 of 2 was 3.98e+04, usually about 0.0399" in report.verdict.text
    )
    assert "in micro-batch 0 of 2" in report.verdict.text
    assert step(1.0) is None
    reading = monitor.reading
    assert reading is not None
    assert (reading.passes, reading.findings[0].passes) == (2, 2)
    # the larger one has a scale of 2^6
    assert reading.findings[0].headroom_bits == pytest.approx(math.log2(65504 / 12800), abs=1e-3)


def test_sums_that_are_not_finite_have_no_room(engine: Engine) -> None:
    training = Training(engine)
    for bad in (False, True):
        training.optimizer.backward(training.half.float().sum())
        if bad:
            training.half.grad[3] = torch.nan
        training.optimizer.accumulate()
    training.optimizer.step()
    found = training.reading.findings[0]
    assert (found.kinds, found.headroom_bits) == (("NaN",), None)


def test_what_nobody_measured_is_null(engine: Engine, tmp_path: Any) -> None:
    training = Training(engine)
    training.half.grad = training.wide.grad = None
    training.optimizer.scale([torch.ones(()), torch.ones(())])  # outputs, no loss
    training.half.grad = torch.zeros(64).half()
    training.optimizer.step()
    reading = training.reading
    assert (reading.loss, reading.largest_loss, reading.headroom_bits) == (None, None, None)
    assert reading.zeros == 1.0
    assert reading.flushed is None  # all may have been too small, or none
    assert "flushed" not in reading.numbers()
    lines = mpcore.JsonLines(tmp_path / "run.jsonl")
    for record in training.records:
        lines(record)
    text = (tmp_path / "run.jsonl").read_text(encoding="utf-8")
    assert json.loads(text.splitlines()[0])["flushed"] is None
    assert read_records(tmp_path / "run.jsonl") == training.records
    wide = nn.Parameter(torch.ones(2))
    optimizer = engine.wrap(torch.optim.SGD([wide], lr=0.1), mpcore.NoLossScale())
    monitor = mpcore.Monitor(optimizer, every=1)
    optimizer.backward(wide.sum())
    optimizer.step()
    assert monitor.reading is not None
    assert (monitor.reading.subnormal, monitor.reading.flushed) == (None, None)
    assert monitor.reading.zeros == 0.0


def test_sums_that_came_before_the_monitor_are_not_known(engine: Engine) -> None:
    training = Training(engine)
    training.monitor.close()
    training.micro_batch(noise(0))
    monitor = mpcore.Monitor(training.optimizer, every=1)
    training.optimizer.step()
    reading = monitor.reading
    assert reading is not None
    assert (reading.zeros, reading.subnormal, reading.flushed) == (None, None, None)
    assert (reading.loss, reading.headroom_bits, reading.passes) == (None, None, 1)
    assert reading.grad_norm > 0
    training.micro_batch(noise(0))
    training.micro_batch(noise(1), added=False)  # what came last joins at the step
    training.optimizer.step()
    assert monitor.reading is not None
    assert monitor.reading.findings[0].passes == 2


def test_bytes_include_the_sums(engine: Engine) -> None:
    training = Training(engine)
    training.step([1.0, 1.0])
    memory = training.reading.memory
    assert memory.sums == 4 * 72
    assert memory.total == memory.sums + memory.weights + memory.gradients + memory.masters
    training.step([1.0], added=False)
    assert training.reading.memory.sums == 0


@pytest.mark.parametrize("every", [1, 3])
def test_watching_accumulation_changes_no_bit(engine: Engine, every: int) -> None:
    rule = mpcore.DynamicLossScale(SCALE, growth_interval=2)
    watched, plain = Training(engine, rule, every), Training(engine, rule)
    plain.monitor.close()
    for number in range(6):
        for training in (watched, plain):
            training.step([1.0, 2.0], bad=1 if number == 3 else None)
    assert same_bits(watched.optimizer.state_dict(), plain.optimizer.state_dict())
    assert same_bits([watched.half, watched.wide], [plain.half, plain.wide])


def test_between_readings_nobody_counts_or_waits(engine: Engine) -> None:
    grads = [noise(0).half() * SCALE, noise(0)[:8] * SCALE]
    counts = []
    for watched in (True, False):
        training = Training(engine, every=100)
        if not watched:
            training.monitor.close()
        training.step([1.0, 1.0])
        with ScalarReads() as reads:  # those of the backends
            for _ in range(2):
                training.optimizer.scale(torch.ones(()))
                training.half.grad, training.wide.grad = (grad.clone() for grad in grads)
                training.optimizer.accumulate()
        counts.append(reads.count)
        assert training.monitor._counts._totals == {}
    assert counts[0] == counts[1]


def test_passes_that_were_thrown_away_are_forgotten(engine: Engine) -> None:
    training = Training(engine)
    training.micro_batch(noise(0), loss=1e9)
    training.optimizer.zero_grad()
    training.step([1.0, 2.0])
    assert (training.reading.loss, training.reading.passes) == (3.0, 2)
    assert training.reading.findings[0].passes == 2
