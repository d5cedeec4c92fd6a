"""The command line, as a user types it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace

import mpcore
import pytest
from mpcore.base.table import Table
from mpcore.cli import app, missing_extra
from mpcore.cli.output import show_table
from mpcore.demo.experiment import make_settings, run_demo
from mpcore.demo.regimes import DIGITS_REGIMES, GPT_REGIMES
from mpcore.demo.tables import digits_table, gpt_table
from rich.console import Console
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_demo_prints_both_tables_and_writes_a_report(tmp_path):
    output = tmp_path / "report.html"
    result = run("demo", "--quick", "--steps", 3, "--seed", 1, "--output", output)
    assert result.exit_code == 0, result.output
    for regime in (*GPT_REGIMES, *DIGITS_REGIMES):
        assert result.output.count(regime.label) >= 2
    assert "seed 1" in result.output
    page = output.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert all(regime.label in page for regime in GPT_REGIMES)


@pytest.mark.parametrize("name", ["missing/report.html", "."])
def test_demo_refuses_an_impossible_output_before_it_trains(name, tmp_path):
    result = run("demo", "--output", tmp_path / name)
    assert result.exit_code == 2
    assert result.output.startswith("mpcore: output: expected a file")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "value"), [("--seeds", 0), ("--steps", 0), ("--seed", -1), ("--steps", 2**31)]
)
def test_demo_refuses_impossible_counts_in_one_line(option, value):
    result = run("demo", option, value)
    assert result.exit_code == 2
    assert result.output.startswith(f"mpcore: {option[2:]}: expected")
    assert result.output.count("\n") == 1


def test_tables_fit_a_terminal_of_80_columns():
    class Silent:
        def begin(self, label, total):
            return lambda done, note: None

    settings = make_settings(quick=True, steps=2)
    digits = replace(settings.digits, epochs=1)
    result = run_demo(replace(settings, digits=digits), Silent())
    for table in (gpt_table(result), digits_table(result)):
        console = Console(width=80, record=True, file=io.StringIO())
        show_table(table, console)
        shown = console.export_text()
        assert "…" not in shown
        for row in table.rows:
            assert any(line.split() == " ".join(row).split() for line in shown.splitlines()), row


def test_numbers_are_never_cut_off_in_a_terminal_of_80_columns():
    rows = tuple(
        (name, "2.3913 (2.3760 to 2.4095)", "+46.47%", "5.8 (5 to 7)", "2^28 2^29", "0.0%", "27.1%")
        for name in ("FP16 + masters + headroom", "FP32")
    )
    header = ("Regime", "Loss", "vs FP32", "Skips", "Final scale", "Tiny grads", "Updates lost")
    console = Console(width=80, record=True, file=io.StringIO())
    show_table(Table("Title", header, rows, ()), console)
    words = console.export_text().split()
    assert not [word for word in words if "…" in word]
    assert {word for row in rows for cell in row for word in cell.split()} <= set(words)


def test_doctor_prints_what_it_found():
    result = run("doctor")
    assert result.exit_code == 0
    for word in ("PyTorch", "Triton", "CPU flags", "16-bit format", "Loss scale", "Backend"):
        assert word in result.output


def test_doctor_json_is_json_and_says_the_same():
    result = run("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["versions"]["mpcore"] == mpcore.__version__
    assert set(found["number_format"]) == {"choice", "reason"}
    assert found["backend"]["choice"] in {"reference", "cpu", "compiled", "triton"}


def test_version_is_that_of_the_package():
    assert run("--version").output.strip() == mpcore.__version__


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "bench", "reproduce", "compare", "report", "doctor"):
        assert f" {command} " in result.output


MISSING = [
    ("typer", "typer", "doctor"),
    ("rich", "rich", "doctor"),
    ("jinja2", "jinja2", "demo"),
    ("matplotlib", "matplotlib", "demo"),
    ("sklearn", "scikit-learn", "demo"),
]
#: one interpreter imports torch, and a fork of it runs each command
WITHOUT = f"""
import os, sys
import mpcore

for package, _, command in {MISSING}:
    if not os.fork():
        # None in sys.modules makes an import fail as if the package were not installed
        sys.modules[package] = None
        sys.argv = ["mpcore", command]
        from mpcore.cli import main
        sys.exit(main())
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_missing_extra_is_one_friendly_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["1"] * len(MISSING)
    assert done.stderr.splitlines() == [
        f'mpcore: the command line needs {shown}. Run: pip install "mpcore[demo]"'
        for _, shown, _ in MISSING
    ]


def test_missing_module_that_is_no_extra_is_a_bug_and_raises():
    error = ModuleNotFoundError("No module named 'mpcore.typo'", name="mpcore.typo")
    with pytest.raises(ModuleNotFoundError):
        missing_extra(error)


def test_importing_the_command_line_needs_no_extra():
    program = "import sys, mpcore.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"typer", "rich", "matplotlib", "jinja2", "sklearn"} & set(loaded)
