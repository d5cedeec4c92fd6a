"""A monitor on the device: every skipped step is reported, and clean steps wait for nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mpcore
import torch

from mpcore_testing.gpu import DEVICE, no_sync


def test_every_skipped_step_is_reported_and_clean_ones_wait_for_nothing() -> None:
    params = [torch.nn.Parameter(torch.ones(64, device=DEVICE).half()) for _ in range(3)]
    inner = torch.optim.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=0.01)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.DynamicLossScale(2.0**10))
    loss, records = torch.ones((), device=DEVICE), list[Any]()
    monitor = mpcore.Monitor(optimizer, every=1000, sinks=[records.append])

    def step(value: float) -> None:
        optimizer.scale(loss)
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()

    step(1.0)
    step(1.0)  # the first ones upload tables
    with no_sync():
        for _ in range(20):
            step(1.0)
    skipped = [22, 23, 24, 30, 61]
    for number in range(22, 62):
        step(torch.inf if number in skipped else 1.0)
    assert monitor.report() is records[-1]
    monitor.close()
    reports = [record for record in records if isinstance(record, mpcore.OverflowReport)]
    assert [report.step for report in reports] == skipped
    assert [report.skips_in_a_row for report in reports] == [1, 2, 3, 1, 1]
    scales = [(report.loss_scale, report.next_scale) for report in reports]
    assert scales == list(pairwise(2.0**10 / 2**i for i in range(6)))
    assert all(len(report.overflowed) == 3 for report in reports)
