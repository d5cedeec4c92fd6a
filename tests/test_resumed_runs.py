"""Runs that were stopped and resumed: steps count on, each is told once, lost ones are counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring.history import Course
from mpcore.monitoring.records import read_records
from mpcore.monitoring.run_log import RunLog
from mpcore.report.run_page import render_runs

SCALES = [
    mpcore.DynamicLossScale(2.0**6),
    mpcore.StaticLossScale(2.0**6),
    mpcore.NoLossScale(),
    mpcore.HeadroomLossScale(),
]


class Training:
    """A model of one weight whose loss at step i is i, so that every step shows in the log."""

    def __init__(self, scale: Any, path: Path, every: int = 4) -> None:
        self.weight = torch.nn.Parameter(torch.ones(2).bfloat16())
        inner = torch.optim.SGD([self.weight], lr=1e-3)
        self.optimizer = mpcore.MixedPrecisionOptimizer(inner, scale)
        self.monitor = mpcore.Monitor(self.optimizer, every=every, sinks=[mpcore.JsonLines(path)])
        self.done = 0

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            loss = (self.weight.float() * 0).sum() + self.weight.float().sum() * 1e-3
            self.optimizer.backward(loss - loss.detach() + self.done)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
        return self

    def saved(self) -> tuple[Any, int]:
        return copy.deepcopy(self.optimizer.state_dict()), self.done

    def resume(self, saved: tuple[Any, int]) -> Training:
        state, self.done = saved
        self.optimizer.load_state_dict(state)
        return self


def losses(log: RunLog) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in log.losses]


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: type(scale).__name__)
@pytest.mark.parametrize("together", [True, False])
def test_parts_of_a_run_are_joined(scale: Any, together: bool, tmp_path: Path) -> None:
    """Saved at 6, killed at 11 (of which 8 are told), resumed at 6: 2 steps are taken again."""
    first = tmp_path / "first.jsonl"
    second = first if together else tmp_path / "second.jsonl"
    before = Training(scale, first).run(6)
    saved = before.saved()
    before.run(5)
    after = Training(scale, second).resume(saved).run(9)
    after.monitor.close()
    log = RunLog.read(first) if together else RunLog.read(first, second)
    assert losses(log) == [(step, float(step)) for step in range(15)]
    assert (log.resumed, log.repeated, log.missing, log.torn) == ((6,), 2, 0, 0)
    assert [reading.step for reading in log.readings] == [3, 7, 11]
    assert "Resumed at step 6; 2 steps were taken again." in render_runs([log], "Run")


def test_a_part_alone_begins_where_it_began(tmp_path: Path) -> None:
    saved = Training(SCALES[0], tmp_path / "first.jsonl").run(6).saved()
    part = Training(SCALES[0], tmp_path / "second.jsonl").resume(saved).run(4)
    assert part.monitor.course().step == 6
    log = RunLog.read(tmp_path / "second.jsonl")
    assert (log.steps, log.missing, log.resumed, log.told()) == ([6, 7], 0, (), "")


def test_a_load_in_mid_run_goes_back(tmp_path: Path) -> None:
    """Without a new monitor: what was not told yet is told before, and the steps go on from 5."""
    path = tmp_path / "run.jsonl"
    training = Training(SCALES[0], path).run(5)
    saved = training.saved()
    training.run(5)  # 8 and 9 are not told yet
    training.resume(saved)
    assert [course.step for course in read_records(path) if isinstance(course, Course)] == [0, 4, 8]
    assert training.monitor.course().loss == ()
    training.run(3)
    assert training.monitor.course().loss == (5.0, 6.0, 7.0)
    training.monitor.close()
    log = RunLog.read(path)
    assert losses(log) == [(step, float(step)) for step in range(8)]
    assert (log.resumed, log.repeated) == ((5,), 5)


def test_losses_with_scales_of_their_own_count_as_steps_of_one_optimizer(tmp_path: Path) -> None:
    def make() -> Any:
        weight = torch.nn.Parameter(torch.ones(2).half())
        optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=1e-3))
        return weight, optimizer, optimizer.add_loss("other", mpcore.StaticLossScale(8.0))

    weight, optimizer, other = make()
    for _ in range(3):
        optimizer.backward(weight.float().sum())
        other.backward(weight.float().sum())
        optimizer.step()
        optimizer.zero_grad()
    saved = optimizer.state_dict()
    _, again, _ = make()
    again.load_state_dict(saved)
    assert mpcore.Monitor(again).course().step == 3


def test_a_monitor_that_comes_later_has_the_numbers_of_the_optimizer(tmp_path: Path) -> None:
    training = Training(SCALES[1], tmp_path / "a.jsonl").run(3)
    later = mpcore.Monitor(training.optimizer)
    training.run(2)
    assert (later.course().step, later.course().loss) == (3, (3.0, 4.0))


@pytest.mark.parametrize("cut", [1, 4, 11, 40])
def test_lines_that_were_cut_off_are_counted(cut: int, tmp_path: Path) -> None:
    """Killed in the middle of a line: the course of steps 4 to 7, with their reading told."""
    path = tmp_path / "run.jsonl"
    training = Training(SCALES[0], path).run(6)
    saved = training.saved()
    training.run(2)
    *whole, last, _ = path.read_text().split("\n")
    assert last.startswith('{"kind": "course"')
    path.write_text("\n".join([*whole, last[:cut]]))
    assert read_records(path).torn == 1
    Training(SCALES[0], path).resume(saved).run(6).monitor.close()
    log = RunLog.read(path)
    assert (log.torn, log.resumed, log.missing, log.repeated) == (1, (6,), 2, 0)
    assert log.steps == [0, 1, 2, 3, *range(6, 12)]
    assert [reading.step for reading in log.readings] == [3, 7, 11]  # 7 as it was taken again
    told = "Resumed at step 6; 2 steps were not recorded; 1 line of the log was cut off."
    assert log.told() == told


def test_a_run_without_its_optimizers_state_counts_on(tmp_path: Path) -> None:
    """And a checkpoint of the second part is of its steps, after those of the first."""
    path = tmp_path / "run.jsonl"
    Training(SCALES[0], path).run(8)
    second = Training(SCALES[0], path).run(6)
    saved = second.saved()
    second.run(2)
    Training(SCALES[0], path).resume(saved).run(2)
    log = RunLog.read(path)
    assert log.steps == list(range(16))
    assert (log.resumed, log.repeated) == ((8, 14), 2)
