"""`mpcore bench`: rows of other libraries, whether they are there and of which version."""

from __future__ import annotations

import csv
import importlib.metadata
import io
from dataclasses import replace

import numpy as np
import torch
from mpcore.bench import contenders, peers, report
from mpcore.bench.experiment import BenchSettings, run_bench
from mpcore.bench.shapes import ParameterList

from mpcore_testing.benchmarks import one_measurement  # noqa: F401 - for all tests here

CPU = torch.device("cpu")
SMALL = ParameterList("small", ((7, 13), (4099,)))


class Silent:
    def begin(self, label, total):
        return lambda done, note: None


def test_absent_peers_are_listed_as_absent(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = peers.peer_rows(CPU)
    assert [row.missing for row in found] == ["not installed"] * len(found)
    assert {row.key for row in found} >= {"optimi", "bitsandbytes", "torchao", "apex"}


class Torch16(contenders.TorchAmp):
    def __init__(self, given, peer):
        super().__init__(given, True)


def test_csv_and_notes_state_the_versions_of_peers_that_were_timed(monkeypatch):
    stand_in = replace(peers.PEERS[0], package="numpy", name="a peer")
    monkeypatch.setattr(peers, "PEERS", (stand_in, *peers.PEERS[1:]))
    monkeypatch.setattr(peers, "Unscaled", Torch16)
    settings = BenchSettings(
        (SMALL,), rounds=2, threads=1, backend="reference", rows=("fused", "numpy", "apex")
    )
    result = run_bench(settings, Silent())
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(report.to_csv(result)))}
    assert lines["numpy"]["median_s"]
    assert lines["numpy"]["peer_version"] == np.__version__
    assert lines["fused"]["peer_version"] == lines["apex"]["peer_version"] == ""
    assert any(
        note.startswith(f"a peer {np.__version__}: ")
        for note in report.bytes_table(result, SMALL).notes
    )


def test_versions_are_those_of_what_installed_a_package():
    assert peers.version_of("torch") == torch.__version__
    assert peers.version_of("xdist") == importlib.metadata.version("pytest-xdist")
    assert peers.version_of("no_such_package") is None


def test_peers_for_gpus_say_so_on_a_cpu(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    missing = {row.key: row.missing for row in peers.peer_rows(CPU)}
    assert missing["apex"] == "runs on cuda only"
    assert missing["optimi"] is None
