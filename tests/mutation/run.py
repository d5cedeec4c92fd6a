"""Applies each seeded error to a copy of the sources and runs the tests that should notice it.

    python tests/mutation/run.py [--write] [WORD ...]

Words choose mutants by path or name: `mpcore/` those of the engine. `--write` puts the result of a
complete run into docs/mutants.md. The test that killed a mutant there is asked first, the others if
it lets the mutant live. The exit status is 0 if every mutant was killed.
"""

import argparse
import contextlib
import multiprocessing
import multiprocessing.pool
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

# one import serves all runs, which are forks of this process; none of them imports the kernels here
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import torch._dynamo  # noqa: F401 - which an optimizer of torch imports
import triton.language  # noqa: F401
from adopting import ADOPT
from casting import CASTING
from course import COURSE
from drivers import DRIVERS
from elementwise import ELEMENTWISE
from engine_gradients import GRADIENTS
from engine_moments import MOMENTS
from engine_ranks import RANKS
from engine_state import STATE
from engine_stores import STORES
from engine_weights import WEIGHTS
from fused_updates import UPDATES
from launches import LAUNCHES, MACHINE_CODE
from mixed_paths import MIXED
from reductions import REDUCTIONS
from watching import WATCHING

OF_KERNELS = [*ELEMENTWISE, *REDUCTIONS, *ADOPT, *LAUNCHES, *UPDATES, *MACHINE_CODE]
OF_THE_ENGINE = [
    *(*GRADIENTS, *WEIGHTS, *STATE, *STORES, *MOMENTS),
    *(*MIXED, *COURSE, *DRIVERS, *RANKS, *CASTING, *WATCHING),
]
MUTANTS = [*OF_KERNELS, *OF_THE_ENGINE]
ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
PAGE = ROOT / "docs" / "mutants.md"
# an error may turn into an endless loop
SECONDS = 600
HEAD = """# Mutants

Each row is an error that was put into a copy of the sources on purpose, and the first test that
failed because of it. A test suite that lets one of them live proves less than it seems to. `make
mutants` repeats the run and writes this page; the lists are in `tests/mutation`. Those of the
engine are in what keeps training right around a step: what users, exceptions, checkpoints and other
optimizers do to gradients, weights and state.

"""


def copy_to(folder):
    """Copies what the tests need."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("kernels", "mpcore", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def apply(mutant, folder):
    """Changes the text of one file; raises if it is not there exactly once."""
    path = folder / mutant.path
    text = path.read_text()
    if text.count(mutant.text) != 1:
        raise ValueError(f"{mutant.path}: {mutant.text!r} is there {text.count(mutant.text)} times")
    path.write_text(text.replace(mutant.text, mutant.replacement))


def last_killers():
    """Returns the test that killed each mutant when the page was written, by file and error."""
    rows = re.findall(r"^\| `(.+)` \| (.+) \| `(test_\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    return {(file, name): test for file, name, test in rows}


def run_tests(folder, tests, only, log):
    """Runs pytest in this process, which is a fork; exits with its status."""
    os.chdir(folder)
    roots = [str(folder), str(folder / "kernels"), str(folder / "tests" / "support")]
    sys.path[:0] = roots
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)  # of processes that a test starts
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "--assert=plain",
            "-m",
            "not exhaustive",
            "-k",
            only,
        ]
        status = pytest.main([*options, *tests])
    os._exit(int(status))


def run_audit(folder, name):
    """Audits the variants of one name; returns the status and the first broken rule."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(folder / "kernels")
    command = [sys.executable, "-m", "mpcore_audit", "--kernel", name]
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    rows = [line for line in run.stdout.splitlines() if line.startswith("|")][2:]
    verdicts = [row.strip("| ").split(" | ")[-1].strip() for row in rows]
    broken = [verdict for verdict in verdicts if verdict != "ok"]
    # without a table, the kernel does not compile at all
    return run.returncode, "audit: " + (broken or run.stderr.strip().splitlines()[-1:] or ["ok"])[0]


def run_in_fork(folder, tests, only=""):
    """Returns whether the tests failed that have `only` in their name, and the first that did."""
    log = folder / "log"
    process = multiprocessing.get_context("fork").Process(
        target=run_tests, args=(folder, tests, only, log)
    )
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return True, "does not end"
    if process.exitcode < 0:
        return True, f"dies of {signal.Signals(-process.exitcode).name}"
    lines = log.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    reason = failed[0].split(" - ")[0].split("::")[-1] if failed else lines[-1] if lines else ""
    none_is_called_so = process.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED and only
    return process.exitcode != 0 and not none_is_called_so, reason.split("[")[0]


def judge(tests, mutant=None, likely=None):
    """Returns whether the tests failed, and the first that did, with `mutant` applied.

    The test that is called `likely` is run first, and the others only if it passes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        if mutant:
            apply(mutant, folder)
        if tests[0].startswith("audit "):
            status, reason = run_audit(folder, tests[0].removeprefix("audit "))
            return status != 0, reason
        if likely is not None:
            failed, reason = run_in_fork(folder, tests, likely)
            if failed:
                return failed, reason
        return run_in_fork(folder, tests)


def judge_mutant(mutant, killers):
    """Returns the mutant, whether it was killed, why, and the seconds that took."""
    start = time.monotonic()
    killed, reason = judge(mutant.checks, mutant, killers.get((mutant.file, mutant.name)))
    return mutant, killed, reason, time.monotonic() - start


def judge_original(tests):
    """Returns why the tests fail without any mutant, or nothing."""
    failed, reason = judge(tests)
    return f"{' '.join(tests)}: {reason}" if failed else ""


def page(results):
    """Returns the Markdown page that shows all results."""
    killed = sum(result[1] for result in results)
    lines = [f"**{killed} of {len(results)} mutants were killed.**"]
    for part in dict.fromkeys(mutant.part for mutant in MUTANTS):
        lines += ["", f"## {part.title}", "", f"In `{part.source}`.", ""]
        lines += ["| file | error | killed by |", "|---|---|---|"]
        for mutant, is_killed, reason, _ in results:
            if mutant.part == part:
                by = f"`{reason}`" if is_killed else "**survived**"
                lines.append(f"| `{mutant.file}` | {mutant.name} | {by} |")
    return HEAD + "\n".join(lines) + "\n"


def main():
    """Runs all chosen mutants, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/mutants.md")
    parser.add_argument("words", nargs="*", help="choose mutants by path or name")
    options = parser.parse_args()
    if options.write and options.words:
        parser.error("--write: a page about some of the mutants would mislead; give no words")
    chosen = [
        mutant
        for mutant in MUTANTS
        if not options.words or any(w in f"{mutant.path} {mutant.name}" for w in options.words)
    ]
    start = time.monotonic()
    with multiprocessing.pool.ThreadPool(PROCESSES) as pool:
        originals = sorted({(name,) for mutant in chosen for name in mutant.checks})
        broken = [reason for reason in pool.imap(judge_original, originals) if reason]
        if broken:
            sys.exit("tests fail without any mutant: " + "; ".join(broken))
        results = []
        for result in pool.imap(partial(judge_mutant, killers=last_killers()), chosen):
            mutant, killed, reason, seconds = result
            results.append(result)
            word = "killed  " if killed else "SURVIVED"
            print(f"{word} {seconds:4.0f} s  {mutant.path}: {mutant.name}  [{reason}]", flush=True)
    survivors = sum(not killed for _, killed, _, _ in results)
    print(f"{len(results)} mutants, {survivors} survived, {time.monotonic() - start:.0f} s")
    if options.write:
        PAGE.write_text(page(results))
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
