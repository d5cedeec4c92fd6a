"""Every rule of the audit can fail, and none fails on code that is as it should be."""

import dataclasses

import pytest
import torch

from mpcore_kernels import unscale, widen
from mpcore_kernels._facts import Facts
from mpcore_kernels._machine_code import Body
from mpcore_kernels._verdict import findings, needed_widths

HALF, FULL = torch.float16, torch.float32
THREADS = 256


def body(loads, stores, **changes):
    fields = {"barriers": 0, "shared": 0, "instructions": 100, "loops": False}
    return Body(loads=loads, stores=stores, labels=frozenset("x"), **(fields | changes))


def facts(full, **changes):
    fields = {
        "target": "sm_90",
        "threads": THREADS,
        "registers": 40,
        "stack": 0,
        "spills": 0,
        "shared": 0,
        "barriers": 0,
        "fused": 0,
        "approximations": (),
        "flushes": False,
        "float_atomics": (),
        "specialized": (),
        "bodies": (full,),
    }
    return Facts(**(fields | changes))


# 16 elements a thread: 16-bit in, float32 out
MIXED = widen.variant(HALF, FULL)
GOOD = body({8: 4}, {16: 4})


def test_good_code_breaks_no_rule():
    assert findings(MIXED, facts(GOOD)) == []
    assert findings(unscale.variant(HALF, HALF), facts(body({16: 2}, {16: 2}, barriers=1))) == []
    assert findings(unscale.variant(FULL, FULL), facts(body({16: 4}, {16: 4}, shared=2))) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spills": 3}, "spills: 3"),
        ({"stack": 16}, "16 bytes of local memory"),
        ({"fused": 1}, "1 fused multiply-adds"),
        ({"approximations": ("div.full.f32",)}, "approximate arithmetic: div.full.f32"),
        ({"flushes": True}, "flushes subnormal numbers"),
        ({"float_atomics": ("RED.E.ADD.F32",)}, "atomics on floating-point numbers"),
        ({"specialized": ("grad_ptr",)}, "compiles in the value of grad_ptr"),
    ],
)
def test_a_rule_on_the_whole_kernel_fails(changes, words):
    for variant in (MIXED, dataclasses.replace(MIXED, chunk=0)):
        (found,) = findings(variant, facts(GOOD, **changes))
        assert words in found


@pytest.mark.parametrize(
    ("full", "words"),
    [
        (body({4: 8}, {16: 4}), "loads of 32 bits on the full-chunk path, expected at least 64"),
        (body({8: 4}, {8: 8}), "stores of 64 bits on the full-chunk path, expected at least 128"),
        (body({8: 8}, {16: 4}), "moves 8 bytes per element, needs 6"),
        (body({8: 4}, {16: 5}), "moves 7 bytes per element, needs 6"),
        (body({8: 4}, {}), "as far as can be seen"),
        (body({8: 4}, {16: 4}, barriers=1), "1 barriers on the full-chunk path, expected 0"),
        (body({8: 4}, {16: 4}, shared=1), "1 accesses to shared memory in an elementwise kernel"),
        (body({8: 4}, {16: 4}, loops=True), "a loop"),
    ],
)
def test_a_rule_on_full_chunks_fails(full, words):
    assert any(words in found for found in findings(MIXED, facts(full)))


def test_sixteen_bits_alone_must_be_read_as_widely_as_float32():
    variant = unscale.variant(HALF, HALF)
    (found,) = findings(variant, facts(body({8: 4}, {16: 2})))
    assert found == "loads of 64 bits on the full-chunk path, expected at least 128"


def test_a_wide_tensor_beside_a_narrow_one_must_not_be_read_as_narrowly():
    variant = dataclasses.replace(MIXED, reads=(HALF, FULL), writes=())
    assert findings(variant, facts(body({8: 4, 16: 4}, {}))) == []
    (found,) = findings(variant, facts(body({8: 12}, {})))
    assert found == "12 loads per thread on the full-chunk path, expected 8"


def test_a_reduction_needs_two_barriers_at_most():
    for reductions, allowed in ((1, 2), (2, 4)):
        variant = dataclasses.replace(MIXED, reductions=reductions)
        assert findings(variant, facts(dataclasses.replace(GOOD, barriers=allowed, shared=9))) == []
        (found,) = findings(variant, facts(dataclasses.replace(GOOD, barriers=allowed + 1)))
        assert found == f"{allowed + 1} barriers on the full-chunk path, expected {allowed}"


def test_contraction_is_no_offence_where_it_is_declared():
    assert findings(dataclasses.replace(MIXED, enable_fp_fusion=True), facts(GOOD, fused=1)) == []


def test_needed_bytes_follow_from_the_dtypes():
    assert [unscale.variant(*pair).bytes_needed for pair in ((HALF, HALF), (HALF, FULL))] == [4, 6]
    assert needed_widths([HALF, FULL], [HALF, FULL]) == {8: 4, 16: 4}
    assert needed_widths([HALF], [HALF]) == {16: 8}
