"""What the compiler makes of every kernel on four GPUs, read from the machine code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpcore_audit.variants import variants
from mpcore_testing.lengths import short_and_long

PAGE = Path(__file__).parents[2] / "docs" / "kernel-audit.md"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
FORMATS = re.compile(r" (fp16|bf16|fp32|WEIGHT=None)\b")
# compiling takes minutes: `make test` looks at updates that adopt by AdamW and plain SGD alone,
# since to adopt is the same for all rules
FEW = ["MOMENTS=1 ADOPT", "MOMENTS=3 ADOPT"]
# five programs of 256 threads on an SM of sm_90: 65536 registers / (5 * 256) = 51, in steps of 8
MOST_REGISTERS = 48
# columns that another release of the compiler leaves as they are
LASTING = ["kernel", "GPU", "stack", "spills", "loads", "stores", "bytes", "verdict"]


def run(*arguments):
    """Runs Python without the interpreter for kernels; returns its output as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # the process must find the packages that this process tests
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report():
    return run(Path(__file__).with_name("compile_kernels.py"), *FEW)


# compiling takes minutes: `make test` looks at one GPU, and at each kernel in one combination of
# formats on another maker's; `make audit`, which a change must pass as well, at all
@pytest.fixture(scope="module", params=short_and_long("two GPUs", "all GPUs"))
def audit(request):
    if request.param == "all GPUs":
        return run("-m", "mpcore_audit", "--json")["rows"]
    return request.getfixturevalue("report")["rows"]


# few tests that look at everything: spread over several workers, each would compile it all again
def test_every_kernel_keeps_the_rules_on_every_gpu(audit):
    found = [(row["kernel"], row["GPU"]) for row in audit]
    names = [variant.name for variant in variants()]
    if len(found) < len(names) * len(TARGETS):
        names = [name for name in names if not any(word in name for word in FEW)]
        assert [name for name, target in found if target == "sm_90"] == names
        kernels = [FORMATS.sub("", name) for name, target in found if target == "gfx942"]
        assert kernels == list(dict.fromkeys(FORMATS.sub("", name) for name in names))
        assert 20 < len(kernels) == len(found) - len(names)
    else:
        assert found == [(name, target) for name in names for target in TARGETS]
    broken = {
        f"{row['kernel']} {row['GPU']}": row["verdict"] for row in audit if row["verdict"] != "ok"
    }
    assert broken == {}


def test_both_bodies_of_every_kernel_on_chunks_are_seen(audit):
    for row in audit:
        if row["bytes"] != "-":
            assert len(row["facts"]["bodies"]) == 2, (row["kernel"], row["GPU"])


def test_registers_of_elementwise_kernels_leave_room_for_enough_threads_on_sm_90(audit):
    used = {
        row["kernel"]: row["facts"]["registers"]
        for row in audit
        if row["GPU"] == "sm_90" and row["kernel"].startswith(("unscale", "cast"))
    }
    assert len(used) == 7
    assert {name: count for name, count in used.items() if count > MOST_REGISTERS} == {}


def test_registers_of_updates_leave_room_for_1024_threads_on_sm_90_768_with_three_moments(audit):
    used = {
        row["kernel"]: row["facts"]["registers"]
        for row in audit
        if row["GPU"] == "sm_90" and row["kernel"].startswith("update ")
    }
    adopting = {row["kernel"] for row in audit if "ADOPT" in row["kernel"]}
    assert len(used) == 30 + len(adopting) >= 38
    # 65536 registers / (4 * 256) and / (3 * 256), in steps of 8
    most = {name: 80 if "MOMENTS=3" in name else 64 for name in used}
    assert {name: count for name, count in used.items() if count > most[name]} == {}


@pytest.mark.parametrize(("adopts", "cost"), [("", 28), (" ADOPT=True", 30)])
def test_adam_moves_28_bytes_for_16_bit_weights_and_gradients_and_2_to_adopt(audit, adopts, cost):
    rows = [r for r in audit if r["kernel"] == f"update adam fp16 fp16 MOMENTS=2{adopts}"]
    assert [row["bytes"] for row in rows] == [f"{cost} of {cost}"] * len(
        {row["GPU"] for row in audit}
    )


def test_the_page_shows_the_audit(audit):
    lines = [line.strip("| ") for line in PAGE.read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("kernel ") and "GPU" in line)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[start:]]
    end = next(i for i, row in enumerate(cells) if len(row) < 5)
    head, _, *rows = cells[:end]
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert {row["GPU"] for row in shown} == set(TARGETS)
    assert [row["kernel"] for row in shown[:: len(TARGETS)]] == [v.name for v in variants()]
    found = {(row["kernel"], row["GPU"]) for row in audit}
    shown = [row for row in shown if (row["kernel"], row["GPU"]) in found]
    expected = [{column: row[column] for column in LASTING} for row in audit]
    assert [{column: row[column] for column in LASTING} for row in shown] == expected


def test_alignment_is_promised_for_the_pointers_of_full_chunks_alone(report):
    for entry in report["compiled"]:
        mixed = {"torch.float32"} < set(entry["sides"])
        widths = [8 if mixed and side != "torch.float32" else 16 for side in entry["sides"]]
        assert entry["promises"] == widths, entry["name"]


def test_masked_lanes_are_defined(report):
    for entry in report["compiled"]:
        # `inspect` looks again at a chunk that is not finite
        expected = entry["reads"] + entry["name"].startswith("inspect")
        # a skipped step that adopts reads weight and master alone
        expected += 2 * entry["name"].endswith("ADOPT=True")
        assert (entry["masked_loads"], entry["undefined_loads"]) == (expected, 0), entry["name"]


def test_compiled_kernels_refuse_cpu_tensors(report):
    assert report["refusal"].startswith("tensors: expected a CUDA or ROCm device, got cpu.")
