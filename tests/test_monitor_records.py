"""What readings, reports and the log of a `Monitor` say: one number, order or word at a time."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.engines import Engine
from mpcore_testing.faulty import Model
from mpcore_testing.monitored import SCALE, logged, make, overflow, set_gradients
from mpcore_testing.syncs import ScalarReads

QUICK = Engine("reference", "fused")


def step(params: Any, optimizer: Any, *values: Any, loss: float = 1.0) -> None:
    """Takes a step over gradients that are stored as given."""
    optimizer.scale(torch.tensor(loss))
    for param, given in zip(params, values, strict=True):
        param.grad = torch.as_tensor(given).to(param.dtype).expand_as(param).clone()
    optimizer.step()
    optimizer.zero_grad()


def halves(sizes: Any, dtypes: Any = None, scale: Any = SCALE, start: float = 0.0) -> Any:
    dtypes = dtypes or [torch.float16] * len(sizes)
    params = [
        nn.Parameter(torch.full((size,), start).to(dtype))
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    return params, QUICK.wrap(torch.optim.SGD(params, lr=1.0), scale)


def test_findings_stand_in_the_order_of_the_model(engine: Engine) -> None:
    """Whatever order the optimizer has, and although 16-bit gradients are looked at first."""
    model = Model().half()
    model.norm.float()
    names = [name for name, _ in model.named_parameters()]
    dtypes = [param.dtype for param in model.parameters()]
    assert torch.float32 in dtypes[:-1]
    backwards = list(model.parameters())[::-1]
    optimizer = engine.wrap(torch.optim.SGD(backwards, lr=0.1), mpcore.DynamicLossScale(2.0**4))
    monitor = mpcore.Monitor(optimizer, model, every=1)
    step(backwards, optimizer, *[1.0] * (len(names) - 1), torch.inf)
    reading, report = monitor.reading, monitor.report()
    assert reading is not None
    assert report is not None
    assert [finding.name for finding in reading.findings] == names
    assert [finding.name for finding in report.findings] == names


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_reports_and_the_log_name_the_rank(
    monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    params, optimizer = make(QUICK, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer)
    with logged() as records:
        overflow(params, optimizer)
    report = monitor.report()
    assert report is not None
    assert report.rank == rank
    where = "" if rank is None else f" on rank {rank}"
    assert str(report).startswith(f"Step 0 was skipped{where}: ")
    [record] = records
    assert record.getMessage().startswith(f"step 0 skipped{where}: search; ")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "1 of 3 gradients, p0 +inf. "),
        ([1], "1 of 3 gradients in micro-batch 1, p0 +inf. "),
        ([0, 2], "1 of 3 gradients in micro-batch 0, 2, p0 +inf. "),
        ([0, 1, 2, 3, 5], "1 of 3 gradients in micro-batch 0, 1, 2 and 2 more, p0 +inf. "),
    ],
)
def test_the_log_names_the_micro_batches(bad: list[int], said: str) -> None:
    params, optimizer = make(QUICK, mpcore.DynamicLossScale(2.0**10))
    mpcore.Monitor(optimizer)
    with logged() as records:
        if not bad:
            overflow(params, optimizer)
        else:
            for number in range(6):
                set_gradients(params, optimizer, number)
                if number in bad:
                    params[0].grad[0, 0] = torch.inf
                optimizer.accumulate()
            optimizer.step()
    [record] = records
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(("loss", "level"), [(1.0, "INFO"), (math.nan, "WARNING")])
def test_only_what_asks_for_something_is_a_warning(loss: float, level: str) -> None:
    params, optimizer = halves([2], scale=mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer)
    with logged() as records:
        step(params, optimizer, torch.inf, loss=loss)
    report = monitor.report()
    assert report is not None
    assert report.verdict.normal == (level == "INFO")
    assert [record.levelname for record in records] == [level]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_of_several_passes_the_loss_that_is_not_finite_is_told(
    order: tuple[int, ...], bad: float
) -> None:
    params, optimizer = halves([2], scale=mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer)
    losses = [bad, 1.0, 2.0]
    for number in order:
        optimizer.scale(torch.tensor(losses[number]))
    params[0].grad = torch.full((2,), torch.inf).half()
    optimizer.step()
    report = monitor.report()
    assert report is not None
    assert report.verdict.name == "forward"
    assert str(report.loss) == str(bad)


def test_a_reading_counts_the_weights_that_were_clamped() -> None:
    params, optimizer = halves([3, 2], start=65504.0)
    monitor = mpcore.Monitor(optimizer, every=1)
    counts = []
    for values in ((-1.0, 0.0), (0.0, -1.0), (0.0, 0.0)):
        step(params, optimizer, *(torch.full((1,), value * 1e3 * 2**6) for value in values))
        counts.append(monitor.reading.saturated if monitor.reading is not None else None)
    assert counts == [3, 3 + 5, 3 + 5 + 5]  # those that were clamped stay too large


def test_a_reading_estimates_what_became_zero_from_how_counts_fall_off() -> None:
    """2, 4 and 8 at the lowest exponents of float16: as many again as there are in the first."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    params, optimizer = halves([64, 32, 128], dtypes)
    monitor = mpcore.Monitor(optimizer, every=1)
    lowest = [2.0**-24] * 2 + [2.0**-23] * 4 + [2.0**-22] * 8
    low = torch.tensor(lowest + [0.0] * 50)
    step(params, optimizer, low, 1.0, 1.0)
    assert monitor.reading is not None
    assert monitor.reading.flushed == pytest.approx(2 / (64 + 32))  # of the 16-bit values


def test_the_room_of_a_reading_is_that_of_the_gradient_with_the_least() -> None:
    params, optimizer = halves([2, 2, 2])
    monitor = mpcore.Monitor(optimizer, every=1)
    step(params, optimizer, 2.0, 2.0**9, 2.0**4)
    assert monitor.reading is not None
    assert monitor.reading.headroom_bits == pytest.approx(math.log2(65504 / 2**9))


def test_the_headroom_before_is_that_of_the_last_clean_step(engine: Engine) -> None:
    """A step that overflows has finite gradients too: they say nothing about clean ones."""
    weight = nn.Parameter(torch.zeros(2).half())
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1.0), SCALE)
    monitor = mpcore.Monitor(optimizer, every=1)  # the cpu backend looks in readings alone
    rooms = []
    for values in ([4.0, 1.0], [torch.inf, 2.0**12], [torch.inf, 2.0**12], [8.0, 1.0]):
        step([weight], optimizer, torch.tensor(values))
        report = monitor.report()
        rooms.append(None if report is None else report.headroom_before)
    step([weight], optimizer, torch.inf)
    report = monitor.report()
    assert report is not None
    clean = math.log2(65504 / 4)
    assert rooms == [None, pytest.approx(clean), pytest.approx(clean), None]
    assert report.headroom_before == pytest.approx(math.log2(65504 / 8))


@pytest.mark.parametrize(
    "dtypes", [[torch.float16], [torch.float16, torch.bfloat16, torch.float32]]
)
@pytest.mark.parametrize("number", [1, 20])
def test_a_reading_reads_the_device_six_times(number: int, dtypes: Any) -> None:
    """Scale and loss, whole numbers, others, lost updates, clamped weights, the course."""
    counts = []
    for every in (None, 2):
        params, optimizer = halves([3] * number * len(dtypes), dtypes * number)
        monitor = None if every is None else mpcore.Monitor(optimizer, every=every)
        step(params, optimizer, *[1.0] * len(params))
        optimizer.scale(torch.tensor(1.0))
        for param in params:
            param.grad = torch.ones_like(param)
        with ScalarReads() as counter:
            optimizer.step()
        counts.append(counter.count)
        assert monitor is None or monitor.reading is not None
    assert counts[1] - counts[0] == 6
