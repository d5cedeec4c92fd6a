"""`make gpu`, rehearsed on the CPU; and what becomes of a run in which something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpcore_testing.gpu_run.compare import Differences
from mpcore_testing.gpu_run.page import MARK, to_page
from mpcore_testing.gpu_run.parts import PARTS, Part
from mpcore_testing.gpu_run.record import Recorder
from mpcore_testing.gpu_run.runner import Run
from mpcore_testing.gpu_run.training import wrong

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = f"# On a GPU\n\n{MARK}\nold results\n"
#: what the run needs of a copy of the tree
NEEDED = ("mpcore", "kernels", "tests/gpu", "tests/support", "docs/gpu.md")


def bare_copy(folder):
    """The sources alone: no library that was built, no environment, no git."""
    ignore = shutil.ignore_patterns("__pycache__", "_built")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_rehearsal_of_a_bare_copy_runs_every_part_without_failure(tmp_path):
    tree, out = bare_copy(tmp_path / "tree"), tmp_path / "out"
    # the parts are processes: what one compiles of the copy, the next ones need not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, str(tree / "tests/gpu/run.py"), "--rehearse", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md"]
    found = json.loads((out / "gpu.json").read_text())
    assert list(found["parts"]) == [part.name for part in PARTS]
    assert {part["status"] for part in found["parts"].values()} == {"complete"}
    rows = {name: part["rows"] for name, part in found["parts"].items()}
    assert not [row for part in rows.values() for row in part if "error" in row]
    assert not [name for part in found["parts"].values() for name in part["not_run"]]
    # interpreted kernels have the bits of the reference, whole steps too
    compared = [row for row in rows["bits"] + rows["engine"] if "values" in row]
    assert len(compared) >= 19
    assert [row["different"] for row in compared] == [0] * len(compared)
    assert all(row["counters"] == row["expected"] for row in rows["engine"])
    assert {row["wrong"] for row in rows["training"]} == {None}
    assert len(rows["training"]) == 6
    page = (out / "gpu.md").read_text()
    assert page.startswith("# On a GPU\n")
    assert "This was a rehearsal on a CPU" in page
    assert all(f"### {part.title}" in page for part in PARTS)
    assert "Failed" not in page
    # with a GPU the same rows show numbers
    found["mode"] = "full"
    shown = to_page(found, TEMPLATE)
    assert "rehearsal" not in shown
    assert "| ... |" not in shown


WRITES = (
    "import sys; sys.path.insert(0, {support!r})\n"
    "from pathlib import Path\n"
    "from mpcore_testing.gpu_run.record import Recorder\n"
    "record = Recorder(Path(sys.argv[1]), 100.0)\n"
    "record.row('one', lambda: {{'value': 1}})\n"
)
ENDINGS = {
    "fine": "record.save()",
    "raises": "raise RuntimeError('an illegal memory access was encountered')",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "import time; time.sleep(600)",
}


def run_of(names, tmp_path, limit=60.0, say=lambda line: None):
    """A run whose parts end as their names say."""

    def command(name, path, seconds):
        code = WRITES.format(support=str(ROOT / "tests" / "support")) + ENDINGS[name]
        return [sys.executable, "-c", code, str(path)]

    run = Run(tmp_path / "out", "full", command, TEMPLATE, limit, say)
    return run, [Part(name, f"Part that {name}", 1.0) for name in names]


def read(tmp_path):
    return json.loads((tmp_path / "out" / "gpu.json").read_text())


def test_a_part_that_raises_or_dies_is_told_with_its_rows_and_the_next_ones_run(tmp_path):
    run, parts = run_of(["raises", "dies", "fine"], tmp_path)
    run.run(parts)
    found = read(tmp_path)["parts"]
    assert [found[name]["status"] for name in ("raises", "dies", "fine")] == [
        "failed: exit status 1",
        "failed: signal 9",
        "complete",
    ]
    assert all([row["name"] for row in part["rows"]] == ["one"] for part in found.values())
    assert "illegal memory access" in "\n".join(found["raises"]["output"])
    assert not run.complete
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "illegal memory access" in page
    assert "old results" not in page


def test_a_part_that_hangs_is_cut_off_and_keeps_its_rows(tmp_path):
    run, parts = run_of(["hangs"], tmp_path, limit=15.0)
    run.run(parts)
    part = read(tmp_path)["parts"]["hangs"]
    assert part["status"].startswith("cut off after")
    assert [row["name"] for row in part["rows"]] == ["one"]


def test_a_part_for_which_no_time_is_left_is_named(tmp_path):
    run, parts = run_of(["fine"], tmp_path, limit=0.0)
    run.run(parts)
    assert read(tmp_path)["parts"]["fine"]["status"] == "not run"
    assert "not run" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_run_that_is_interrupted_leaves_whole_files_with_the_rows_so_far(tmp_path):
    class Interrupted(Exception):
        pass

    def say(line):
        fine = run.found["parts"].get("fine", {"status": "running"})
        if line.startswith("  one") and fine["status"] == "complete":
            raise Interrupted

    run, parts = run_of(["fine", "hangs"], tmp_path, say=say)
    with pytest.raises(Interrupted):
        run.run(parts)
    found = read(tmp_path)
    assert found["ended"] is None
    assert found["parts"]["fine"]["status"] == "complete"
    assert "this run was cut off" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_row_that_raises_is_kept_with_its_traceback_and_time_ends_rows(tmp_path, capsys):
    now = [0.0]
    record = Recorder(tmp_path / "part.json", 10.0, clock=lambda: now[0])

    def fails():
        raise ValueError("a reason")

    assert record.row("first", fails) is None
    assert record.row("second", lambda: {"value": float("inf")}) is not None
    now[0] = 10.0
    assert record.row("third", lambda: {}) is None
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["rows"][0]["error"] == "ValueError: a reason"
    assert "in fails" in found["rows"][0]["traceback"]
    assert found["rows"][1]["value"] == "inf"
    assert found["not_run"] == ["third"]
    assert "first: ValueError: a reason" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_differences_are_counted_in_units_and_the_first_has_its_inputs(dtype):
    expected = torch.tensor([1.0, -1.0, 0.0, torch.nan, 2.0, torch.inf], dtype=dtype)
    actual = expected.clone()
    up = torch.tensor(9.0, dtype=dtype)
    actual[1] = actual[1].nextafter(-up).nextafter(-up)
    actual[2] = -0.0
    actual[5] = 1.0
    found = Differences()
    found.add("out", expected, expected)
    found.add("out", actual, expected, {"x": torch.arange(6.0), "c": torch.tensor(0.5)})
    row = found.to_row()
    assert (row["values"], row["different"], row["max_ulp"], row["other"]) == (12, 3, 2, 1)
    assert (row["first"]["of"], row["first"]["index"]) == ("out", 1)
    assert row["first"]["inputs"]["x"].startswith("1.0 (0x3f800000")
    assert row["first"]["inputs"]["c"].startswith("0.5 ")


def test_units_are_counted_across_zero():
    tiny = torch.tensor([1, -(2**15) + 2], dtype=torch.int16).view(torch.float16)
    found = Differences()
    found.add("out", tiny[:1], tiny[1:])
    assert found.max_ulp == 3


def test_losses_are_judged_by_their_way_down_and_by_fp32():
    fp32 = [10.0, 9.5, 9.0, 8.5, 8.0]
    assert wrong(fp32, fp32) is None
    assert wrong([10.0, 9.51, 9.02, 8.4, 8.1], fp32) is None
    # a step that was not taken
    assert wrong([10.0, 10.0, 9.5, 9.0, 8.5], fp32) == "loss 10.0000 at step 2, FP32 9.5000"
    assert "does not go down" in wrong([10.0] * 5, fp32)
    assert wrong([10.0, float("nan"), 9.0, 8.5, 8.0], fp32) == "loss nan at step 2, FP32 9.5000"


def test_the_run_on_a_gpu_imports_nothing_that_a_gpu_machine_may_lack():
    names = ["numpy", "pytest", "hypothesis", "rich", "typer", "matplotlib", "scipy", "jinja2"]
    code = (
        "import sys, importlib\n"
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels'), str(ROOT / 'tests/support')]!r}\n"
        f"sys.modules.update(dict.fromkeys({names!r}))\n"  # None: an import of it raises
        f"for name in {[part.name for part in PARTS]!r}:\n"
        "    importlib.import_module(f'mpcore_testing.gpu_run.{name}')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_docs_has_a_place_for_results():
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").count(MARK) == 1
