"""Runs the core suite with other versions of PyTorch and Triton, each in an environment of its own.

    python .ci/compat.py "torch==2.13.0 triton==3.9.0" "torch==2.14.1 triton==3.8.0"

Each argument is what one environment gets, beside NumPy, pytest and hypothesis; mpcore is installed
from this tree. The row of each in docs/versions.md is written anew, rows of others stay. A CUDA
build of torch unpacks gigabytes: an environment is removed before the next is made.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
import venv
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
#: One of each kind: what a step computes and keeps, on every backend that a CPU has.
CORE = (
    *("optimizer_api", "optimizer_clipping", "fused_path_steps", "compiled_training"),
    *("state_dict", "grad_scaler", "cast_model", "accumulation", "monitor"),
)
KERNELS = ("unscale", "inspect", "update_skips", "scale")
FILES = (
    *(f"tests/test_{name}.py" for name in CORE),
    *(f"tests/kernels/test_{name}.py" for name in KERNELS),
)
SEEN = """
import platform, torch, triton
print(platform.python_version(), torch.__version__, triton.__version__)
"""
BEGIN = "| Python | PyTorch | Triton | passed | failed | on |\n|---|---|---|---|---|---|\n"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository; what it prints is kept."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        # the kernels' tests read tables of the audit, which no wheel has
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "kernels")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def tried(versions: str) -> str:
    """Installs versions, runs the suite with them, and returns the row of the table.

    Raises:
        RuntimeError: They cannot be installed, or the suite could not be collected.
    """
    with tempfile.TemporaryDirectory(prefix="mpcore-compat-") as name:
        venv.create(name, with_pip=True, symlinks=True)
        python = Path(name) / "bin" / "python"
        tools = ("numpy>=1.26", "pytest>=8", "hypothesis>=6.100", "packaging", "hatchling")
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        for what in ((*tools, *versions.split()), ("--no-build-isolation", "--no-deps", ".")):
            done = run(*pip, *what)
            if done.returncode != 0:
                raise RuntimeError(f"{versions}: {done.stdout}")
        suite = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES)
        found = re.findall(r"(\d+) (passed|failed)", suite.stdout)
        counts = {kind: int(number) for number, kind in found}
        if suite.returncode not in (0, 1) or not counts:
            raise RuntimeError(f"{versions}: {suite.stdout[-4000:]}")
        print("\n".join(line for line in suite.stdout.splitlines() if line.startswith("FAILED")))
        installed = " | ".join(run(python, "-c", SEEN).stdout.split())
        numbers = f"{counts.get('passed', 0):,} | {counts.get('failed', 0):,}"
        return f"| {installed} | {numbers} | {datetime.date.today()} |"


def with_row(page: str, row: str) -> str:
    """Returns the page with a row in its table, in place of that of the same versions."""
    before, after = page.split(BEGIN)
    rows = [*takewhile(lambda line: line.startswith("|"), after.splitlines(keepends=True))]
    versions = row.split("|")[1:4]
    kept = [line for line in rows if line.split("|")[1:4] != versions]
    return before + BEGIN + "".join(sorted([*kept, row + "\n"])) + after[len("".join(rows)) :]


def main() -> int:
    """Tries each argument; returns 1 if one could not be installed, or a test failed."""
    bad = 0
    for versions in sys.argv[1:]:
        try:
            row = tried(versions)
        except RuntimeError as error:
            print(error)
            bad = 1
            continue
        print(row)
        bad |= int(row.split("|")[5].strip() != "0")
        PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), row), encoding="utf-8")
    return bad


if __name__ == "__main__":
    sys.exit(main())
