"""`mpcore bench`, as a user types it."""

from __future__ import annotations

import csv
import io
import json

import pytest
from mpcore.cli import app
from typer.testing import CliRunner

from mpcore_testing.benchmarks import one_measurement  # noqa: F401 - for all tests here

TINY = ("--shapes", "500,4099", "--rounds", "2", "--threads", "1", "--backend", "reference")


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "80"})
    return runner.invoke(app, ["bench", *(str(argument) for argument in arguments)])


def test_bench_prints_tables_and_writes_csv_and_plot(tmp_path):
    found = run(*TINY, "--csv", tmp_path / "bench.csv", "--plot", tmp_path / "bench.svg")
    assert found.exit_code == 0, found.output
    for label in ("mpcore, fused", "mpcore, general", "torch AMP, fused", "masters by hand"):
        assert found.output.count(label) >= 4  # two tables for each of two lists
    assert "…" not in found.output
    assert "USDT" not in found.output
    text = (tmp_path / "bench.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert {line["shapes"] for line in lines} == {"500", "4,099"}
    assert "<svg" in (tmp_path / "bench.svg").read_text(encoding="utf-8")


def test_plot_of_three_lists_has_a_panel_over_sizes(tmp_path):
    options = ("--shapes", "100,200,300", "--rounds", 1, "--threads", 1, "--rows", "amp-foreach")
    found = run(*options, "--plot", tmp_path / "bench.png")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_train_and_host_print_their_tables():
    found = run("--train")
    assert found.exit_code == 0, found.output
    assert "Activations" in found.output
    assert "…" not in found.output
    found = run("--host", "--quick", "--threads", 1, "--backend", "reference")
    assert found.exit_code == 0, found.output
    assert "torch AdamW(fused=True)" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "gpt9"), "shapes: expected gpt2, small, sweep"),
        (("--rows", "fast"), "rows: expected some of fused, watched, read, edits, cpu, general"),
        (("--rounds", 0), "rounds: expected at least 1"),
        (("--threads", 0), "threads: expected at least 1"),
        (("--dtype", "float8"), "dtype: expected one of"),
        (("--device", "nowhere"), "device: expected cpu or cuda"),
        (("--device", "meta"), "device: expected cpu or a CUDA device"),
        (("--device", "meta", "--train"), "device: expected cpu or a CUDA device"),
        (("--device", "meta", "--host"), "device: expected cpu or a CUDA device"),
        (("--csv", "missing/bench.csv"), "csv: expected a file"),
        (("--plot", "bench.txt"), "plot: expected a name ending in"),
        (("--host", "--train"), "host: expected one of"),
        (("--host", "--csv", "h.csv"), "csv: expected none with --host, where it has no effect"),
        (("--host", "--plot", "h.svg"), "plot: expected none with --host"),
        (("--host", "--rows", "fused"), "rows: expected none with --host"),
        (("--host", "--dtype", "float16"), "dtype: expected none with --host"),
        (("--train", "--csv", "t.csv"), "csv: expected none with --train, where it has no effect"),
        (("--train", "--shapes", "nonsense"), "shapes: expected none with --train"),
        (("--train", "--backend", "cpu"), "backend: expected none with --train"),
    ],
)
def test_bench_refuses_impossible_options_in_one_line(arguments, message):
    found = run(*arguments)
    assert found.exit_code == 2
    assert found.output.startswith(f"mpcore: {message}")
    assert found.output.count("\n") == 1


def test_json_has_the_numbers_of_the_csv_and_nothing_else_is_on_standard_output(tmp_path):
    found = run(*TINY, "--rows", "fused", "--json", "--csv", tmp_path / "bench.csv")
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    assert len(printed["rows"]) == len(lines) == 4
    for row, line in zip(printed["rows"], lines, strict=True):
        assert row["label"] == line["label"]
        assert row["median_s"] == float(line["median_s"]) > 0
    assert all(str(value) == lines[0][name] for name, value in printed["machine"].items())


def test_json_is_refused_where_there_is_a_table_only():
    found = run("--host", "--json")
    assert found.exit_code == 2
    assert "json: expected none with --host" in found.output
