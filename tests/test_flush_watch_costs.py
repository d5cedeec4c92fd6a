"""The watch for float16 gradients that flush: why its bound is what it is, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import mpcore
import numpy as np
import pytest
import torch
from mpcore.demo.digits import DigitsSettings, Images, SideBySideMLP, summed_loss
from mpcore.demo.regimes import FP16_MASTERS, prepare
from mpcore.emulate import emulate_tensor_cores
from mpcore.engine import flush_watch
from mpcore.engine.flush_watch import FIRST, TOO_MANY
from torch import Tensor, nn

from mpcore_testing.engines import GENERAL, Engine
from mpcore_testing.flushing import BRAIN, FULL, HALF, SAYS, Net
from mpcore_testing.syncs import ScalarReads, fake_cuda

# ------------------------------------------------------------------ why this bound


def shares(weight: float) -> tuple[float, float, float]:
    """Of the digits' gradients in the 8th step: below 2^-14, below 2^-22, and flushed to 0."""
    settings = DigitsSettings(epochs=1, seeds=(0,))
    images = Images.load()
    model, engine = prepare(
        SideBySideMLP((64, *settings.hidden, 10), settings.seeds),
        *(FP16_MASTERS, settings.adamw, mpcore.NoLossScale()),
    )
    for number, (inputs, labels) in enumerate(next(iter(images.epochs(settings))), start=1):
        grads = []
        for scale in (2.0**16, 1.0):
            engine.zero_grad()
            with emulate_tensor_cores():
                engine.backward(summed_loss(model(inputs), labels) * (weight * scale))
            grads.append(np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]))
        if number == FIRST:
            break
        engine.step()
    exact, size = (np.abs(grad.astype(np.float64)) for grad in grads)
    some = size[size > 0]
    flushed = np.sum((size == 0) & (exact > 0)) / np.sum(exact > 0)
    return float(np.mean(some < 2.0**-14)), float(np.mean(some < 2.0**-22)), float(flushed)


def rows_of_the_table() -> Iterator[tuple[float, list[float], bool]]:
    for line in (flush_watch.__doc__ or "").splitlines():
        found = re.fullmatch(r"    (1(?:e-\d)?) +(\d+) % +(\d+) % +(\d+) %( +warned of)?", line)
        if found:
            yield float(found[1]), [int(found[i]) / 100 for i in (2, 3, 4)], bool(found[5])


def test_the_bound_lies_between_what_trains_well_and_what_loses_gradients() -> None:
    rows = list(rows_of_the_table())
    assert len(rows) == 5
    for weight, table, warned in rows:
        found = shares(weight)
        # the table is in percents
        assert found == pytest.approx(table, abs=0.01), weight
        assert (found[1] > TOO_MANY) == warned == (found[2] > 0.05)


# ------------------------------------------------------------------ what it costs


def test_it_looks_at_powers_of_two_and_else_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, looks = Net(GENERAL), list[int]()
    counts = flush_watch._counts
    monkeypatch.setattr(
        flush_watch, "_counts", lambda *given: (looks.append(net.passes), counts(*given))[1]
    )
    reads = []
    for _ in range(70):
        with ScalarReads() as counter:
            net.step(1.0)
        reads.append(counter.count)
    assert looks == [8, 16, 32, 64]
    assert {n for number, n in enumerate(reads, start=1) if number not in looks} == {1}
    assert {reads[number - 1] for number in looks} == {2}  # on a CPU, where reading costs nothing


class Device:
    """Stands in for CUDA: a copy arrives when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fast, self.capturing, self.copies = True, False, 0
        device = self

        class Copy:
            def __init__(self, tensor: Tensor) -> None:
                assert not device.capturing
                device.copies += 1
                kept = None if tensor.is_cuda else tensor.numpy().copy()
                self.values = SimpleNamespace(tolist=lambda: kept.tolist())  # type: ignore[union-attr]

            def has_arrived(self) -> bool:
                assert not device.capturing
                return device.fast

        monkeypatch.setattr(flush_watch, "HostCopy", Copy)
        monkeypatch.setattr(flush_watch, "comes_late", lambda device: True)
        monkeypatch.setattr(flush_watch, "is_capturing", lambda device: self.capturing)


def test_a_gpu_is_not_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    device, net = Device(monkeypatch), Net(engine)
    device.fast = False
    for _ in range(FIRST + 5):
        net.step(1e-5)
    assert device.copies == 1  # one is on its way
    device.fast = True
    with pytest.warns(UserWarning, match=SAYS):
        net.step(1e-5)
    for _ in range(2 * FIRST):
        net.step(1e-5)
    assert device.copies == 1


def test_late_answers_without_a_finding_are_followed_by_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, net = Device(monkeypatch), Net(GENERAL)
    for number in range(1, 34):
        net.step(1.0)
        assert device.copies == sum(number >= look for look in (8, 16, 32))


def test_a_capture_is_not_looked_at_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    device, net = Device(monkeypatch), Net(GENERAL)
    device.capturing = True
    for _ in range(FIRST + 2):
        net.step(1e-5)
    device.capturing = False
    net.step(1e-5)
    assert device.copies == 1
    device.capturing = True
    net.step(1e-5)
    device.capturing = False
    with pytest.warns(UserWarning, match=SAYS):
        net.step(1e-5)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_look_on_a_gpu_stays_there(monkeypatch: pytest.MonkeyPatch, accumulates: bool) -> None:
    device = Device(monkeypatch)
    device.fast = False
    monkeypatch.setattr(flush_watch, "why_no_memory", lambda _: None)  # fake tensors have none
    with fake_cuda() as watch:
        shapes = [((3, 4), HALF), ((0, 4), HALF), ((), BRAIN), ((5,), FULL)]
        params = [nn.Parameter(torch.empty(s, dtype=d, device="cuda")) for s, d in shapes]
        optimizer = GENERAL.wrap(torch.optim.AdamW(params, fused=True), mpcore.NoLossScale())
        operations = []
        for _ in range(FIRST + 1):
            before = watch.operations
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.scale(torch.empty((), device="cuda"))
            if accumulates:
                optimizer.accumulate()
            optimizer.step()
            optimizer.zero_grad()
            operations.append(watch.operations - before)
        assert watch.reads == 0
    assert device.copies == 1
    *others, look, after = operations[1:]
    assert set(others) == {after}
    assert look > after


def test_the_watch_goes_on_over_a_loaded_state(engine: Engine) -> None:
    net = Net(engine)
    for _ in range(FIRST - 1):
        net.step(1e-5)
    net.optimizer.load_state_dict(net.optimizer.state_dict())
    with pytest.warns(UserWarning, match=SAYS):
        net.step(1e-5)
