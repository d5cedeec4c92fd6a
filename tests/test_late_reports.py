"""Skipped steps of a CUDA device: each is reported, some steps late, and nobody waits for it."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import mpcore
import pytest
import torch
from mpcore.monitoring import pending
from mpcore.monitoring.history import Course
from mpcore.monitoring.pending import LIMIT
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.run_log import RunLog

from mpcore_testing.engines import Engine
from mpcore_testing.monitored import logged, make, overflow, set_gradients
from mpcore_testing.syncs import ScalarReads

QUIET = Engine("reference", "fused")  # reads no value on the host
NEVER = 10**9


class Device:
    """Stands in for CUDA: a copy arrives when so many others were made after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
        self.delay, self.copies, self.waits, self.capturing = delay, 0, 0, False
        device = self

        class Copy:
            def __init__(self, tensor: torch.Tensor) -> None:
                assert not device.capturing
                device.copies += 1
                self._number = device.copies
                kept = tensor.numpy().copy()  # reading pinned memory is no read of the device
                self.values = SimpleNamespace(tolist=self._read_from(kept))

            def _read_from(self, kept: Any) -> Any:
                def tolist() -> Any:
                    assert self._waited or self.has_arrived()
                    return kept.tolist()

                return tolist

            _waited = False

            def has_arrived(self) -> bool:
                assert not device.capturing
                return self._waited or device.copies - self._number >= device.delay

            def wait(self) -> None:
                device.waits += not self.has_arrived()
                self._waited = True

        monkeypatch.setattr(pending, "HostCopy", Copy)
        monkeypatch.setattr(pending, "comes_late", lambda device: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


def clean(params: Any, optimizer: Any, seed: int) -> None:
    set_gradients(params, optimizer, seed)
    optimizer.step()
    optimizer.zero_grad()


def told_of(engine: Engine, *, several: bool, steps: int = 24) -> list[Any]:
    """What sinks hear of a run with skips by themselves, in a row, of sums, and in readings."""
    records: list[Any] = []
    scale = mpcore.DynamicLossScale(2.0**10, growth_interval=4)
    params, optimizer = make(engine, scale)
    other = optimizer.add_loss("other", mpcore.DynamicLossScale(2.0**3)) if several else None
    with mpcore.Monitor(optimizer, every=8, window=6, sinks=[records.append]):
        for step in range(steps):
            if step == 10:  # the second of three micro-batches
                for part in range(3):
                    set_gradients(params, optimizer, part)
                    if part == 1:
                        params[1].grad[0, 0] = torch.nan
                    optimizer.accumulate()
                optimizer.step()
            elif step == 12 and other is not None:
                set_gradients(params, optimizer, step)
                other.backward((params[0].float() * torch.inf).sum())
                optimizer.step()
            elif step in (0, 4, 5, 6, 7, 18, 23):
                overflow(params, optimizer, -torch.inf if step == 5 else torch.inf)
            else:
                clean(params, optimizer, step)
    return records


def without_times(records: list[Any]) -> list[Any]:
    return [{k: v for k, v in record.to_dict().items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("delay", [0, 1, 3, NEVER])
def test_what_sinks_hear_of_a_device_is_what_they_hear_of_a_cpu(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, delay: int, several: bool
) -> None:
    """The same records in the same order, each as of its own step."""
    at_once = told_of(engine, several=several)
    device = Device(monkeypatch, delay)
    late = told_of(engine, several=several)
    assert device.copies == 21  # 24 steps but those of readings
    assert without_times(late) == without_times(at_once)
    reports = [record for record in late if isinstance(record, mpcore.OverflowReport)]
    skipped = sorted({0, 4, 5, 6, 7, 10, 18, 23} | ({12} if several else set()))
    assert [report.step for report in reports] == skipped
    assert [report.skipped_steps for report in reports] == list(range(1, len(skipped) + 1))
    log = RunLog.of("run", late)
    assert log.resumed == ()
    assert [report.step for report in log.overflows] == [step for step, _ in log.skipped]


def reads_of_steps(records: list[Any] | None) -> list[int]:
    """How many values each of 20 steps reads, of which the tenth overflows."""
    params, optimizer = make(QUIET, mpcore.DynamicLossScale(2.0**10))
    if records is not None:
        mpcore.Monitor(optimizer, every=100, sinks=[records.append])
    reads = []
    for step in range(20):
        set_gradients(params, optimizer, step)
        if step == 9:
            params[2].grad[1, 2] = torch.inf
        with ScalarReads() as counter:
            optimizer.step()
            optimizer.zero_grad()
        reads.append(counter.count)
        if records is not None:
            assert [record.step for record in records] == ([9] if step >= 12 else [])
    return reads


def test_steps_that_are_not_skipped_read_nothing_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unwatched = reads_of_steps(None)
    device = Device(monkeypatch, 3)
    with logged() as records:
        watched = reads_of_steps([])
    more = [after - before for before, after in zip(unwatched, watched, strict=True)]
    assert [step for step, count in enumerate(more) if count] == [12]  # it tells of the tenth
    assert (device.copies, device.waits) == (20, 0)
    lines = [record.getMessage().split(";")[0] for record in records]
    assert lines == ["step 9 skipped: search"]


def test_a_host_that_is_too_far_ahead_waits_for_the_first_step_and_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, records = Device(monkeypatch, NEVER), list[Any]()
    params, optimizer = make(QUIET, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer, every=1000, window=1, sinks=[records.append])
    skipped = [0, 1, LIMIT, LIMIT + 4]
    for step in range(2 * LIMIT):
        if step in skipped:
            overflow(params, optimizer)
        else:
            clean(params, optimizer, step)
        assert device.waits == max(0, step + 1 - LIMIT)
        assert [r.step for r in records] == [s for s in skipped if s <= step - LIMIT]
    monitor.close()
    assert [r.step for r in records[:-1]] == skipped
    assert isinstance(records[-1], Course)
    assert len(records[-1].loss_scale) == 2 * LIMIT


@pytest.mark.parametrize("last", ["skipped", "clean", "none", "loaded"])
def test_asking_for_the_report_tells_of_all_steps_once(
    monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    Device(monkeypatch, NEVER)
    records: list[Any] = []
    params, optimizer = make(QUIET, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer, sinks=[records.append])
    overflow(params, optimizer)
    if last == "skipped":
        overflow(params, optimizer)
    elif last == "clean":
        clean(params, optimizer, 1)
    elif last == "none":
        optimizer.step()
    else:
        saved = optimizer.state_dict()
        saved["mpcore"]["loss_scale"] |= {"scale": 2.0**5, "steps": 900, "skipped_steps": 30}
        optimizer.load_state_dict(saved)
    # a load tells of what came before, whose steps are not those that follow
    assert [type(r) for r in records] == (
        [mpcore.OverflowReport, Course] if last == "loaded" else []
    )
    for _ in range(2):
        report = monitor.report()
        told = [r.step for r in records if isinstance(r, mpcore.OverflowReport)]
        assert told == ([0, 1] if last == "skipped" else [0])
        assert report is (records[1] if last == "skipped" else None)
    assert (records[0].next_scale, records[0].skipped_steps) == (2.0**9, 1)
    monitor.close()
    monitor.close()
    assert [type(r) for r in records[-2:]] == [mpcore.OverflowReport, Course]


def test_a_reading_comes_after_the_reports_of_steps_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Device(monkeypatch, NEVER)
    records: list[Any] = []
    params, optimizer = make(QUIET, mpcore.DynamicLossScale(2.0**10))
    mpcore.Monitor(optimizer, every=4, sinks=[records.append])
    for _ in range(4):
        overflow(params, optimizer)
    assert [(type(r), r.step) for r in records] == [
        *((mpcore.OverflowReport, step) for step in range(3)),
        (Reading, 3),
        (mpcore.OverflowReport, 3),
        (Course, 0),
    ]


@pytest.mark.parametrize("captured", [5, LIMIT + 3])
def test_nothing_is_sent_or_told_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, captured: int
) -> None:
    monkeypatch.setattr("mpcore.monitoring.monitor._LONGEST", 2)
    monkeypatch.setattr("mpcore.monitoring.monitor.SKIPS", 1)
    device, records = Device(monkeypatch, 1), list[Any]()
    params, optimizer = make(QUIET, mpcore.DynamicLossScale(2.0**10))
    mpcore.Monitor(optimizer, every=10**9, window=2, sinks=[records.append])
    overflow(params, optimizer)
    device.capturing = True
    for step in range(captured):
        clean(params, optimizer, step)
    assert (device.copies, records) == (1, [])
    device.capturing, device.delay = False, 0
    clean(params, optimizer, 0)
    # after very many steps in a capture nobody remembers the skipped one
    assert [record.step for record in records] == ([0] if captured < LIMIT else [])


def test_the_report_of_a_step_in_a_capture_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in lets such a step happen; a graph's replays would have to come first."""
    device, records = Device(monkeypatch, NEVER), list[Any]()
    params, optimizer = make(QUIET, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer, sinks=[records.append])
    overflow(params, optimizer)
    device.capturing = True
    overflow(params, optimizer)
    device.capturing = False
    report = monitor.report()
    assert report is not None
    assert ([record.step for record in records], report.step) == ([0], 1)


@pytest.mark.parametrize("way", ["step", "clip", "unscale", "sum"])
def test_steps_on_their_way_keep_no_gradient_alive(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Nor the float32 ones of masters: 32 steps' worth would not fit."""
    Device(monkeypatch, NEVER)
    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer)
    seen = []
    for number in range(3):
        set_gradients(params, optimizer, number)
        seen += [weakref.ref(param.grad) for param in params]
        if way == "unscale":
            optimizer.unscale_()
            seen += [weakref.ref(grad) for grad in optimizer.grads()]
        elif way == "clip":
            optimizer.clip_grad_norm_(1.0)
        elif way == "sum":
            optimizer.accumulate()
        optimizer.step()
        optimizer.zero_grad()
    assert monitor._pending is not None
    assert len(monitor._pending._steps) == 3
    gc.collect()
    assert [grad for grad in seen if grad() is not None] == []
