"""`mpcore memory`: bytes as they are counted in tensors, and what its options refuse."""

from __future__ import annotations

import json

import mpcore
import pytest
import torch
from mpcore.bench.memory_table import memory_rows, memory_table
from mpcore.cli import app
from mpcore.monitoring.memory import resident_bytes
from torch import nn
from typer.testing import CliRunner

WAYS = [
    ("float32", "float32"),
    ("split", "float32"),
    ("split", "bfloat16"),
    ("split", "int8"),
    ("none", "bfloat16"),
    ("none", "int8"),
]


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "200"})
    return runner.invoke(app, ["memory", *map(str, arguments)])


@pytest.mark.parametrize("moments", [0, 1, 2, 3])
def test_rows_are_what_optimizers_keep(moments):
    builds = {
        0: lambda params: torch.optim.SGD(params, lr=0.1),
        1: lambda params: mpcore.optim.Lion(params, lr=0.1),
        2: lambda params: torch.optim.AdamW(params),
        3: lambda params: torch.optim.AdamW(params, amsgrad=True),
    }
    _, *rows = memory_rows(moments)
    for (masters, kept), row in zip(WAYS, rows, strict=True):
        weight = nn.Parameter(torch.ones(64, 512).bfloat16())
        optimizer = mpcore.MixedPrecisionOptimizer(
            builds[moments]([weight]),
            mpcore.NoLossScale(),
            backend="compiled",
            masters=masters,
            moments=kept,
        )
        optimizer.backward(weight.float().sum())
        optimizer.step()
        found = resident_bytes(optimizer)
        size = weight.numel()
        assert found.total == row.held * size
        assert (found.masters, found.moments) == (row.master * size, row.moments * size)
        for compact in (False, True):
            state = optimizer.state_dict(compact=compact)["state"].get(0, {})
            of_it = [t for name, t in state.items() if name not in ("step", "random_key")]
            saved = sum(t.nbytes for t in of_it)
            assert row.file(compact=compact) * size == saved + weight.nbytes


def test_a_size_is_shared_by_ranks():
    table = memory_table(2**30, ranks=4)
    assert table.rows[1][-3:] == ("4.00", "14.00", "14.00")
    assert table.rows[2][-3:] == ("3.50", "14.00", "12.00")


def test_the_command_prints_the_table():
    found = run("1G", "--ranks", 8, "--moments", 1)
    assert found.exit_code == 0, found.output
    assert 'masters="split", moments="int8"' in found.output
    assert "on each of 8 ranks" in found.output
    assert "…" not in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("many",), "a number of parameters such as"),
        (("sweep",), "size: expected one number"),
        (("1M", "--ranks", 0), "ranks: expected at least 1"),
        (("1M", "--moments", -1), "moments: expected at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments, message):
    found = run(*arguments)
    assert found.exit_code == 2
    assert message in found.output


def test_json_has_the_bytes_of_each_way():
    done = run("1000", "--ranks", 4, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["parameters"], found["ranks"]) == (1000, 4)
    assert [way["each"] for way in found["ways"]] == [row.held for row in memory_rows(2)]
    split = next(way for way in found["ways"] if way["label"] == '16 bits, masters="split"')
    assert split == {
        "label": '16 bits, masters="split"',
        **{"weight": 2, "gradient": 2, "master": 2, "moments": 8.0, "each": 14.0},
        **{"held": 3500, "saved": 14000, "saved_compact": 12000},
    }
