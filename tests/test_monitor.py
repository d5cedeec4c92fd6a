"""`mpcore.Monitor`: what it counts, what it costs, and where it sends what it finds."""

from __future__ import annotations

import math
from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.monitoring import pending
from mpcore.monitoring.findings import index_at
from mpcore.monitoring.reading import Reading
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.monitored import SCALE, logged, make, overflow, set_gradients
from mpcore_testing.snapshots import snapshot
from mpcore_testing.syncs import HostSyncError, fake_cuda, steps_without_values


def by_numpy(stored: Any, scale: float) -> dict[str, Any]:
    """Statistics of float16 values, written down a second time."""
    sizes = np.abs(stored)
    exponents = np.floor(np.log2(sizes[sizes > 0])).astype(int)
    return {
        "norm": math.sqrt(float(((stored / scale) ** 2).sum())),
        "largest": float(sizes.max()) / scale,
        "zeros": float((sizes == 0).mean()),
        "subnormal": float(((sizes > 0) & (sizes < 2.0**-14)).mean()),
        "headroom_bits": math.log2(65504 / float(sizes.max())),
        "histogram": tuple(int((exponents == e).sum()) for e in range(-24, 16)),
    }


@pytest.mark.parametrize("way", ["step", "clip", "unscale", "clip after unscale"])
def test_a_reading_agrees_with_numpy(engine: Engine, way: str) -> None:
    params, optimizer = make(engine)
    monitor = mpcore.Monitor(optimizer, every=1)
    for seed in range(3):
        stored = set_gradients(params, optimizer, seed, spread=7.0)
        if "unscale" in way:
            optimizer.unscale_()
        if "clip" in way:
            optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        reading = monitor.reading
        assert (reading.step, reading.skipped, reading.loss_scale) == (seed, False, 2.0**10)
        assert reading.loss == 1.0
        for finding, values in zip(reading.findings, stored, strict=True):
            expected = by_numpy(values, 2.0**10)
            assert finding.norm == pytest.approx(expected["norm"], rel=2e-6)
            assert finding.largest == pytest.approx(expected["largest"], rel=1e-7)
            assert finding.zeros == pytest.approx(expected["zeros"])
            if finding.dtype == "float16":
                assert finding.headroom_bits == pytest.approx(expected["headroom_bits"])
                assert finding.subnormal == pytest.approx(expected["subnormal"])
                assert finding.histogram == expected["histogram"]
                assert reading.histogram == expected["histogram"]
        assert [finding.name for finding in reading.findings] == ["p0", "p1", "p2"]
        norms = [by_numpy(values, 2.0**10)["norm"] for values in stored]
        assert reading.grad_norm == pytest.approx(math.hypot(*norms), rel=2e-6)


@pytest.mark.parametrize("doublings", [-12, -3, 0, 2, 5])
def test_what_another_scale_would_do_is_what_it_does(doublings: int) -> None:
    """Values of few bits, so that none is rounded anew when it becomes subnormal."""
    engine = Engine("reference", "general")
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-22, 14, (4096,), generator=generator)
    values = torch.ldexp(torch.ones(4096), exponents)
    readings = []
    for scale in (1.0, 2.0**doublings):
        param = nn.Parameter(torch.zeros(4096).half())
        optimizer = engine.wrap(torch.optim.SGD([param], lr=0.1), mpcore.StaticLossScale(scale))
        monitor = mpcore.Monitor(optimizer, every=1)
        optimizer.scale(torch.ones(()))
        param.grad = (values * scale).half()
        optimizer.step()
        readings.append((monitor.reading, param.grad))
    lost, over = readings[0][0].at_scale(doublings)
    grad = readings[1][1]
    # exactly half of the smallest number is rounded to 0
    assert lost == float((grad == 0).float().mean())
    assert over == float(grad.isinf().float().mean())


def test_lost_updates_are_those_that_rounding_loses(engine: Engine) -> None:
    weight = nn.Parameter(torch.full((64,), 1.0, dtype=torch.bfloat16))
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=1.0), SCALE)
    monitor = mpcore.Monitor(optimizer, every=1)
    optimizer.scale(torch.ones(()))
    # below one, neighbours of bfloat16 are 2^-8 apart: half of that is rounded to even, which is 1
    steps = torch.cat([torch.full((16,), 2.0**-9), torch.full((16,), 2.0**-9 * 1.25)])
    steps = torch.cat([steps, torch.zeros(32)])
    weight.grad = (steps * 2.0**10).bfloat16()
    optimizer.step()
    assert monitor.reading.lost_updates == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_room_before_an_overflow_is_that_of_the_gradients_own_format(
    dtype: torch.dtype,
) -> None:
    """Counted by doubling until casting gives infinity."""
    weight = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = Engine("reference", "fused").wrap(torch.optim.SGD([weight], lr=1.0), SCALE)
    monitor = mpcore.Monitor(optimizer)
    for value in (3.0, torch.inf):
        optimizer.scale(torch.ones(()))
        weight.grad = torch.tensor([value, 1.0, 0.0]).to(dtype)
        optimizer.step()
    report = monitor.report()
    assert report is not None
    assert report.headroom_before is not None
    doublings, size = 0, torch.tensor(3.0, dtype=torch.float64)
    while (size * 2.0 ** (doublings + 1)).to(dtype).isfinite():
        doublings += 1
    assert math.floor(report.headroom_before) == doublings


def test_updates_of_all_evaluations_of_a_closure_count(engine: Engine) -> None:
    weight = nn.Parameter(torch.full((8,), 2.0).half())
    optimizer = Engine(engine.backend, "general").wrap(
        torch.optim.LBFGS([weight], lr=0.5, max_iter=14, tolerance_change=0.0), SCALE
    )
    monitor = mpcore.Monitor(optimizer, every=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (weight.float() - 0.5).square().sum()
        optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    assert monitor.reading is not None
    assert not torch.equal(weight, torch.full_like(weight, 2.0))
    assert monitor.reading.lost_updates == 0.0  # the last of them, by itself, would be lost


@pytest.mark.parametrize("every", [1, 3])
def test_watching_changes_no_bit(engine: Engine, every: int) -> None:
    runs = []
    for watched in (False, True):
        params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10, growth_interval=2))
        if watched:
            mpcore.Monitor(optimizer, every=every)
        for seed in range(6):
            set_gradients(params, optimizer, seed)
            if seed == 3:
                params[1].grad.view(-1)[2] = torch.inf
            if seed % 2:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        runs.append((snapshot(optimizer), optimizer.state_dict()))
    assert same_bits(*runs)


def test_readings_come_every_n_steps_and_after_closing_no_more(engine: Engine) -> None:
    records: list[Any] = []
    params, optimizer = make(engine)
    monitor = mpcore.Monitor(optimizer, every=3, sinks=[records.append])
    for seed in range(8):
        set_gradients(params, optimizer, seed)
        optimizer.step()
    assert [record.step for record in records if isinstance(record, Reading)] == [2, 5]
    monitor.close()
    heard = len(records)
    set_gradients(params, optimizer, 8)
    optimizer.step()
    set_gradients(params, optimizer, 9)
    optimizer.step()
    assert len(records) == heard


def test_a_report_names_what_where_and_the_finite_ones_too(engine: Engine) -> None:
    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer)
    assert monitor.report() is None
    set_gradients(params, optimizer, 0)
    optimizer.step()
    assert monitor.report() is None
    set_gradients(params, optimizer, 1)
    params[0].grad[1, 2] = -torch.inf
    params[0].grad[2, 3] = torch.nan
    params[2].grad[0, 1] = torch.inf
    optimizer.step()
    optimizer.zero_grad()
    report = monitor.report()
    assert report is not None
    assert report is monitor.report()
    kinds = {finding.name: finding.kinds for finding in report.findings}
    assert kinds == {"p0": ("NaN", "-inf"), "p1": (), "p2": ("+inf",)}
    places = {finding.name: finding.first_bad for finding in report.findings}
    assert places == {"p0": (1, 2), "p1": None, "p2": (0, 1)}
    assert (report.step, report.loss_scale, report.next_scale) == (1, 2.0**10, 2.0**9)
    assert (report.loss, report.skips_in_a_row, report.skipped_steps) == (1.0, 1, 1)
    text = str(report)
    for part in ("p0", "NaN, -inf first at [1, 2]", "p1", "finite, norm", "1024 -> 512"):
        assert part in text


def test_the_pass_that_overflowed_is_in_the_report(engine: Engine) -> None:
    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    monitor = mpcore.Monitor(optimizer)
    for number in range(3):
        set_gradients(params, optimizer, number)
        if number == 1:
            params[1].grad[0, 0] = torch.nan
        optimizer.accumulate()
    optimizer.step()
    report = monitor.report()
    assert report is not None
    assert [(p.micro_batch, p.parameters) for p in report.passes] == [(1, ("p1",))]
    assert [finding.name for finding in report.overflowed] == ["p1"]
    assert "micro-batch 1: p1" in str(report)


def test_the_log_says_each_kind_of_thing_once_in_a_while(engine: Engine) -> None:
    params, optimizer = make(engine, mpcore.DynamicLossScale(2.0**10))
    mpcore.Monitor(optimizer, every=4)
    with logged() as records:
        for _ in range(6):
            overflow(params, optimizer)
    lines = [(r.levelname, r.getMessage().split(";")[0]) for r in records]
    assert lines == [("INFO", "step 0 skipped: search"), ("INFO", "step 4 skipped: search")]


@pytest.mark.parametrize("strides", [(4, 1), (1, 3)])
def test_a_place_in_memory_is_an_index(strides: tuple[int, int]) -> None:
    tensor = torch.arange(12).view(3, 4)
    if strides == (1, 3):
        tensor = tensor.t().contiguous().t()
    in_memory = tensor.as_strided((12,), (1,))
    for place in range(12):
        index = index_at(place, tensor.shape, tensor.stride())
        assert tensor[index] == in_memory[place]


# addresses of fake tensors say nothing; here they only tell whether a plan is still good
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("path", ["general", "fused"])
@pytest.mark.parametrize("way", ["step", "clip", "unscale"])
def test_a_watched_step_never_asks_the_device_unless_it_is_reported(
    path: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    class OnItsWay:
        def __init__(self, tensor: torch.Tensor) -> None:
            sent.append((tensor.device.type, len(tensor)))

        def has_arrived(self) -> bool:
            return False

        def wait(self) -> None:
            raise HostSyncError("the host waited")

    monkeypatch.setattr(pending, "HostCopy", OnItsWay)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with fake_cuda() as watch:
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        params = [nn.Parameter(torch.empty(4, 3, dtype=d, device="cuda")) for d in dtypes]
        inner = torch.optim.AdamW(params, lr=0.1, fused=True)
        optimizer = Engine("reference", path).wrap(inner)
        monitor = mpcore.Monitor(optimizer, every=4)
        steps_without_values(optimizer, params, way)
        assert watch.operations > 100
        assert watch.reads == 0
        assert sent == [("cuda", 5)] * 3
        with pytest.raises((HostSyncError, RuntimeError)):
            monitor.report()


def test_what_cannot_be_watched_is_refused() -> None:
    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(mpcore.ArgumentTypeError, match="expected a mpcore"):
        mpcore.Monitor(plain)  # type: ignore[arg-type]
    optimizer = mpcore.MixedPrecisionOptimizer(plain)
    with pytest.raises(mpcore.ArgumentError, match="every"):
        mpcore.Monitor(optimizer, every=0)
