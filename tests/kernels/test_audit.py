"""The audit finds in real machine code what it is there to find."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from mpcore_audit import command, rows
from mpcore_audit.variants import variants


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # the process must find the packages that this process tests
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | changes


@pytest.fixture(scope="module")
def bad():
    """What the audit finds in kernels that break a rule each."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("bad_kernels.py")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


BROKEN = {
    "narrow": "loads of 32 bits",
    "masked": "loads of 32 bits",
    "contracted": "fused multiply-adds, declared uncontracted",
    "adds_zero": "products added to +0, which makes +0 of -0",
    "adds_zero_beside_a_division": "products added to +0, which makes +0 of -0",
    "contracted_beside_a_division": "fused multiply-adds, declared uncontracted",
    "twice": "moves 16 bytes per element, needs 8",
    "barrier": "barriers on the full-chunk path, expected 0",
    "spills": "bytes of local memory",
    "float_atomic": "atomics on floating-point numbers",
    "specialized": "compiles in the value of x_ptr, y_ptr, n",
    "root": "approximate arithmetic",
    "exponential": "approximate arithmetic",
    "exchanging_tail": "accesses in an elementwise kernel",
    "waiting_tail": "a barrier in a loop",
    "reports_twice": "writes 8 bytes per chunk, needs 4",
    "counts_twice": "2 atomics per thread, expected 1",
}


# one test: spread over several workers, each would compile the kernels again
def test_each_rule_is_broken_by_a_kernel_that_was_written_for_it(bad):
    for target in ("sm_90", "gfx942"):
        assert bad[f"good {target}"]["findings"] == []
        assert bad[f"exact_division {target}"]["findings"] == []
        for name, words in BROKEN.items():
            found = bad[f"{name} {target}"]["findings"]
            assert any(words in finding for finding in found), (name, target, found)
    assert bad["approximate sm_90"]["findings"] == ["approximate arithmetic: div.full.f32"]
    # the same source is an exact division there
    assert bad["approximate gfx942"]["findings"] == []
    only_in_machine_code = {"exponential": "v_exp_f32", "reciprocal_on_amd": "v_rcp_f32"}
    for name, opcode in only_in_machine_code.items():
        assert bad[f"{name} gfx942"]["findings"] == [f"approximate arithmetic: {opcode}"]
    # where a division brings fused multiply-adds along, these are told apart
    assert bad["adds_zero_on_amd gfx942"]["findings"] == [
        "8 products added to +0, which makes +0 of -0"
    ]
    exchange = bad["exchanging_tail sm_90"]["findings"]
    assert any("barriers on the path of other chunks, expected 0" in found for found in exchange)


def test_a_sign_that_compilers_lose_is_seen_and_kept_by_rounding_magnitudes(bad):
    lost = "8 products added to +0, which makes +0 of -0"
    # the compiler of 3.9 does not make one instruction of the product and its rounding
    loses = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    assert (lost in bad["rounded_product gfx942"]["findings"]) == loses
    for name in ("rounded_product sm_90", "rounded_magnitude sm_90", "rounded_magnitude gfx942"):
        assert not any("+0" in finding for finding in bad[name]["findings"])


def test_interpreted_kernels_are_refused(capsys):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled here")
    assert command.main([]) == 2
    assert "Unset TRITON_INTERPRET" in capsys.readouterr().err


def test_every_variant_is_compiled_for_every_gpu():
    names = [target.arch for target in rows.TARGETS]
    assert names == [80, 90, 100, "gfx942"]
    assert len(variants()) == len({variant.name for variant in variants()})


def test_the_table_is_markdown_with_one_line_per_row():
    row = dict.fromkeys(rows.COLUMNS, "x") | {"kernel": "a longer name"}
    lines = rows.table([row, row]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
