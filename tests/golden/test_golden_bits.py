"""The bits are those recorded: on each backend, resumed, on any processor and threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpcore_testing.golden.cases import CASES
from mpcore_testing.golden.comparison import compare
from mpcore_testing.golden.recording import load, record
from mpcore_testing.golden.runs import RUNS

SUPPORT = Path(__file__).resolve().parents[1] / "support"
RECORDED = load()
# One for each kernel, first steps only: an interpreted step takes most of a second. The rest is
# among the exhaustive tests, and `make golden` runs all.
INTERPRETED = {
    "AdamW, mixed": 4,
    "Adam amsgrad maximize, mixed": 3,
    "SGD, mixed": 3,
    "SGD momentum, mixed": 3,
    "Adagrad, mixed": 3,
    "Lion, mixed": 3,
}
# what torch calls them; it is asked for one in lower case
LEVELS = ["DEFAULT", "AVX2", "AVX512"]
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled beside a GPU"
)


def judged(run, steps=None):
    fresh = run.record(steps)
    return compare(RECORDED[run.case], fresh, prefix=steps is not None)


@pytest.mark.parametrize("run", [r for r in RUNS if r.backend != "triton"], ids=str)
def test_bits_are_those_recorded(run):
    assert judged(run) == []


@interpreted
@pytest.mark.parametrize(
    "run", [r for r in RUNS if r.backend == "triton" and r.case in INTERPRETED], ids=str
)
def test_first_bits_of_interpreted_kernels_are_those_recorded(run):
    assert judged(run, INTERPRETED[run.case]) == []


@interpreted
@pytest.mark.exhaustive
@pytest.mark.parametrize("run", [r for r in RUNS if r.backend == "triton"], ids=str)
def test_bits_of_interpreted_kernels_are_those_recorded(run):
    assert judged(run) == []


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("Lion")])
def test_lion_on_the_cpu_backend_has_the_recorded_bits_too(name):
    assert compare(RECORDED[name], record(name, "cpu")) == []


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["long tensors", "long tensors, rounded norms"])
def test_the_number_of_threads_does_not_matter(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compare(RECORDED[name], record(name, "compiled")) == []
    finally:
        torch.set_num_threads(before)


def lower_levels():
    """Those below the processor's own: a higher one would be an illegal instruction."""
    own = torch.backends.cpu.get_cpu_capability()
    known = platform.machine() in ("x86_64", "AMD64") and own in LEVELS
    return LEVELS[: LEVELS.index(own)] if known else []


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_level_of_the_processor_does_not_matter(level):
    """For torch's own operations, and for the library that the compiled backend loads."""
    if level not in lower_levels():
        pytest.skip(f"not below this processor's own level: {level}")
    words = ["mixed", "long", "--without", "triton", "--without", "resumed"]
    source = (
        "import sys, torch\n"
        "from mpcore_testing.golden.__main__ import main\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {level!r}\n"
        f"sys.exit(main({words}, run_all=lambda runs: [run.record() for run in runs]))\n"
    )
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": level.lower(),
        "PYTHONPATH": str(SUPPORT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", source],
        **{"env": environment, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AdamW, mixed" in done.stdout
    assert done.stdout.count("  same\n") > 20


def test_every_case_is_recorded_and_nothing_else():
    assert list(RECORDED) == list(CASES)


def test_the_runs_hold_what_they_are_there_for():
    """A recording of training in which nothing happens would prove little."""

    def last(name, index):
        return RECORDED[name].after["counters"][-1][index]

    def scales(name, index=0):
        return [step[index] for step in RECORDED[name].after["scale"]]

    for name, recorded in RECORDED.items():
        masters, norms = recorded.after["masters"], recorded.after["norm"]
        assert len(set(masters)) >= min(3, len(masters) - 1), name
        if name in (f"{rule}, mixed" for rule in ("AdamW", "SGD", "Lion")):
            assert [norm != "-" for norm in norms] == [n in (2, 6, 7) for n in range(8)]
            assert recorded.after["counters"][0][:3] == [1, 1, 1], "the first step overflows"
            assert masters[4] == masters[5], "a skipped step changes nothing"
            assert last(name, 1) == 2
            assert scales(name) == [512, 512, 1024, 1024, 2048, 1024, 1024, 2048]
    assert last("saturated", 3) > 0
    assert len(set(scales("headroom"))) > 3
    assert scales("scale at its minimum")[-1] == 1
    assert {last("hysteresis", 1), last("tolerance", 1)} == {5}
    skipping = ("hysteresis", "hysteresis, clean refills", "tolerance")
    assert len({tuple(scales(name)) for name in skipping}) == 3
    assert len({scales("several losses", i)[-1] for i in range(3)}) == 3
    assert len(set(scales("mpcore.GradScaler without a wrapper"))) > 1
    # what the compiled backend may have bits of its own for, it has; else one recording would do
    masters = [
        RECORDED[f"rounded norms, float16, {backends}"].after["masters"]
        for backends in ("reference and triton", "compiled")
    ]
    assert masters[0] != masters[1]
