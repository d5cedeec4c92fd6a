"""Benchmarks in tests: what they say of the machine is measured once, and not for each of them."""

from __future__ import annotations

from functools import cache

import pytest
from mpcore.bench import experiment

COPY_BANDWIDTH, EXAMINE_CPU = map(cache, (experiment.copy_bandwidth, experiment.examine_cpu))


@pytest.fixture(autouse=True)
def one_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 256 MiB and products of matrices take longer than the steps over small tensors."""
    monkeypatch.setattr(experiment, "copy_bandwidth", COPY_BANDWIDTH)
    monkeypatch.setattr(experiment, "examine_cpu", EXAMINE_CPU)
