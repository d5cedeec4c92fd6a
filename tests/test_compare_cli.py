"""`mpcore compare`, as a user types it."""

from __future__ import annotations

import json
import math
import re
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


BROKEN = """
import torch

def train(run):
    model = torch.nn.Linear(4, 1)
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        optimizer.backward((model(torch.randn(16, 4)) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if run.seed == 2 and run.policy.name != "float32":
            {ending}
"""


def broken(ending: str) -> str:
    Path("broken.py").write_text(BROKEN.replace("{ending}", ending))
    return "broken.py:train"


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("raise KeyboardInterrupt", 130, "Interrupted in seed 2."),
        ("1 / 0", 1, "broken.py:12, in train: 1 / 0\n  ZeroDivisionError: division by zero\n"),
        ("run.prepare(0, 0)", 1, "broken.py:12, in train: run.prepare(0, 0)\n  StageError: "),
    ],
)
def test_seeds_that_are_complete_are_shown_when_a_later_one_ends(
    loop: Path, ending: str, status: int, said: str
) -> None:
    result = run(broken(ending), "--seeds", 4, "--policies", "bfloat16")
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert "loss (lower is better), seeds: 0, 1\n" in result.stdout
    assert "Of 4 seeds 2 are missing." in result.stdout
    assert "bfloat16: " in result.stdout
    check_well_formed(Path("mpcore-compare.html").read_text(encoding="utf-8"))


def test_without_a_complete_seed_there_is_no_page(loop: Path) -> None:
    result = run(broken("1 / 0"), "--first-seed", 2)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert not Path("mpcore-compare.html").exists()


def test_a_traceback_begins_in_the_file_of_the_user(loop: Path) -> None:
    result = run(broken("1 / 0"), "--first-seed", 2)
    files = re.findall(r'File "(.*?)"', result.stderr)
    assert [Path(name).name for name in files] == ["broken.py"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import torch\n1 / 0\n", "beside.py:2, in <module>: 1 / 0\n  ZeroDivisionError"),
        ("import nowhere_to_be_found\n", "beside.py:1, in <module>: import nowhere"),
        ("def train(run:\n    pass\n", "beside.py:1: SyntaxError: '(' was never closed"),
    ],
)
def test_an_error_of_the_file_itself_names_its_line(loop: Path, text: str, said: str) -> None:
    Path("beside.py").write_text(text)
    result = run("beside.py:train")
    assert result.exit_code == 1
    assert said in result.stderr
    assert "mpcore/cli" not in result.stderr


def test_json_has_the_verdicts_and_nothing_else_is_on_standard_output(loop: Path) -> None:
    result = run("my_loop.py:train", "--seeds", 2, "--policies", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["seeds"] == [0, 1]
    assert found["seeds_missing"] == []
    full, brain = found["policies"]
    assert (full["policy"], full["verdict"], brain["policy"]) == ("float32", None, "bfloat16")
    assert brain["verdict"] in ("matches", "worse", "undecided")
    low, high = brain["interval"]
    assert low <= brain["difference"] <= high
    means = [sum(policy["metrics"]) / 2 for policy in (full, brain)]
    assert math.isclose(means[1] - means[0], brain["difference"], rel_tol=1e-6, abs_tol=1e-9)
    assert brain["skipped_steps"] == [0, 0]
    assert found["report"] == "mpcore-compare.html"


def test_json_of_what_is_not_finite_is_null(loop: Path) -> None:
    ending = "return float('nan')"
    result = run(broken(ending), "--first-seed", 2, "--seeds", 1, "--json")
    assert result.exit_code == 0, result.output
    assert "NaN" not in result.stdout
    assert json.loads(result.stdout)["policies"][1]["metrics"] == [None]
