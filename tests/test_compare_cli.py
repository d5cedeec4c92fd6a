"""`mpcore compare`, as a user types it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mpcore.cli import app
from typer.testing import CliRunner

from mpcore_testing.pages import check_well_formed

LOOP = """
import torch
from numbers_beside import STEPS

def train(run):
    model = torch.nn.Linear(4, 1)
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(STEPS):
        inputs = torch.randn(16, 4)
        targets = inputs.sum(dim=1) + torch.randn(16)  # noise: no policy gets to 0
        optimizer.backward((model(inputs).squeeze() - targets).square().mean())
        optimizer.step()
        optimizer.zero_grad()

nothing = 3
"""


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_loop.py"
    path.write_text(LOOP)
    (tmp_path / "numbers_beside.py").write_text("STEPS = 25")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # which is put back, and the command adds it too
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.mark.parametrize("target", ["my_loop.py:train", "my_loop:train"])
def test_a_loop_in_a_file_or_a_module_is_compared(loop: Path, target: str) -> None:
    result = run(
        *(target, "--policies", "bfloat16, float16", "--seeds", 2, "--first-seed", 4),
        *("--metric", "error", "--margin", 0.5),
    )
    assert result.exit_code == 0, result.output
    assert "error (lower is better), seeds: 4, 5" in result.output
    assert "bfloat16: No worse than FP32 by more than 50.0%" in " ".join(result.output.split())
    page = Path("mpcore-compare.html").read_text(encoding="utf-8")
    check_well_formed(page)


def test_a_metric_with_brackets_is_shown_as_it_is(loop: Path) -> None:
    result = run("my_loop.py:train", "--seeds", 1, "--metric", "mAP [/val]")
    assert result.exit_code == 0, result.output
    assert "mAP [/val] (lower is better)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_loop.py"], "target: expected file.py:function"),
        (["none.py:train"], "target: expected a module"),
        (["none:train"], "target: expected a module"),
        (["my_loop.py:other"], "It has: train."),
        (["my_loop.py:nothing"], "expected a function of my_loop.py"),
        (["my_loop.py:train", "--policies", "half"], "name: expected one of"),
        (["my_loop.py:train", "--seeds", 0], "seeds"),
        (["my_loop.py:train", "--output", "none/page.html"], "output: expected a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(loop: Path, arguments: list[Any], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("mpcore: ")
    assert message in result.output
    assert not Path("mpcore-compare.html").exists()
