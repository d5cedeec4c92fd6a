"""Every rule of the audit can fail, and none fails on code that is as it should be."""

import dataclasses

import pytest
import torch

from mpcore_audit.facts import Facts
from mpcore_audit.machine_code import Body
from mpcore_audit.verdict import allowed_barriers, findings, needed_widths
from mpcore_kernels import _chunks, cast, unscale

HALF, FULL = torch.float16, torch.float32
THREADS = 256


def body(loads, stores, **changes):
    fields = {"results": {}, "atomics": 0, "barriers": 0, "shared": 0, "instructions": 100}
    fields |= {"loops": False, "waits_in_a_loop": False, "labels": frozenset("x")}
    return Body(loads=loads, stores=stores, **(fields | changes))


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
        "adds_zero": 0,
        "approximations": (),
        "flushes": False,
        "float_atomics": (),
        "specialized": (),
        "bodies": (full,),
    }
    return Facts(**(fields | changes))


# 16 elements a thread: 16-bit in, float32 out
MIXED = dataclasses.replace(unscale.variant(HALF, FULL), results=(), reductions=0)
GOOD = body({8: 4}, {16: 4})


def test_good_code_breaks_no_rule():
    assert findings(MIXED, facts(GOOD)) == []
    flag = {"results": {4: 1}}
    full = body({16: 2}, {16: 2}, barriers=1, **flag)
    assert findings(unscale.variant(HALF, HALF), facts(full)) == []
    full = body({16: 4}, {16: 4}, shared=2, **flag)
    assert findings(unscale.variant(FULL, FULL), facts(full, shared=64)) == []
    full = body({16: 4}, {8: 4}, atomics=1)
    assert findings(cast.variant(FULL, HALF), facts(full)) == []
    full = body({16: 2}, {}, results={8: 1, 4: 3}, atomics=4)
    assert findings(_chunks.variant(HALF, True), facts(full)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spills": 3}, "spills: 3"),
        ({"stack": 16}, "16 bytes of local memory"),
        ({"fused": 1}, "1 fused multiply-adds"),
        ({"adds_zero": 2}, "2 products added to +0"),
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
        (body({8: 4}, {16: 4}, shared=1), "0 bytes of shared memory, 1 accesses in an elementwise"),
        (body({8: 4}, {16: 4}, results={4: 1}), "writes 4 bytes per chunk, needs 0"),
        (body({8: 4}, {16: 4}, atomics=1), "1 atomics per thread, expected 0"),
        (body({8: 4}, {16: 4}, waits_in_a_loop=True), "a barrier in a loop"),
        (body({8: 4}, {16: 4}, loops=True), "a loop"),
    ],
)
def test_a_rule_on_full_chunks_fails(full, words):
    assert any(words in found for found in findings(MIXED, facts(full)))


def test_sixteen_bits_alone_must_be_read_as_widely_as_float32():
    variant = unscale.variant(HALF, HALF)
    (found,) = findings(variant, facts(body({8: 4}, {16: 2}, results={4: 1})))
    assert found == "loads of 64 bits on the full-chunk path, expected at least 128"


def test_a_wide_tensor_beside_a_narrow_one_must_not_be_read_as_narrowly():
    variant = dataclasses.replace(MIXED, reads=(HALF, FULL), writes=())
    assert findings(variant, facts(body({8: 4, 16: 4}, {}))) == []
    (found,) = findings(variant, facts(body({8: 12}, {})))
    assert found == "12 loads per thread on the full-chunk path, expected 8"


def test_a_reduction_needs_as_many_barriers_as_the_compiler_makes_for_one():
    releases = {"3.7.1": [0, 2, 5, 23], "3.8.0": [0, 1, 3, 15], "3.10.0": [0, 1, 3, 15]}
    for release, expected in releases.items():
        assert [allowed_barriers(n, release) for n in (0, 1, 2, 8)] == expected


@pytest.mark.parametrize("reductions", [1, 2, 8])
def test_a_barrier_more_than_reductions_need_fails_on_every_path(reductions):
    allowed = allowed_barriers(reductions)
    variant = dataclasses.replace(MIXED, reductions=reductions)
    enough, more = (dataclasses.replace(GOOD, barriers=n, shared=9) for n in (allowed, allowed + 1))
    assert findings(variant, facts(enough, bodies=(enough, enough), shared=64)) == []
    (found,) = findings(variant, facts(more, bodies=(more, enough)))
    assert found == f"{allowed + 1} barriers on the full-chunk path, expected {allowed}"
    (found,) = findings(variant, facts(enough, bodies=(enough, more)))
    assert found == f"{allowed + 1} barriers on the path of other chunks, expected {allowed}"
    whole = dataclasses.replace(variant, chunk=0)
    assert findings(whole, facts(GOOD, bodies=(), barriers=allowed)) == []
    (found,) = findings(whole, facts(GOOD, bodies=(), barriers=allowed + 1))
    assert found == f"{allowed + 1} barriers on all paths together, expected {allowed}"


def test_an_elementwise_kernel_waits_and_shares_nowhere():
    (found,) = findings(MIXED, facts(GOOD, shared=8))
    assert found == "8 bytes of shared memory, 0 accesses in an elementwise kernel"
    (found,) = findings(MIXED, facts(GOOD, barriers=1))
    assert found == "1 barriers on all paths together, expected 0"
    masked = body({2: 16}, {4: 16}, shared=3)
    (found,) = findings(MIXED, facts(GOOD, bodies=(GOOD, masked)))
    assert found == "0 bytes of shared memory, 3 accesses in an elementwise kernel"
    masked = body({2: 16}, {4: 16}, waits_in_a_loop=True)
    (found,) = findings(MIXED, facts(GOOD, bodies=(GOOD, masked)))
    assert found == "a barrier in a loop, whose rounds cannot be counted"


def test_what_is_written_about_a_chunk_is_what_the_variant_declares():
    variant = _chunks.variant(HALF, False)
    assert variant.bytes_needed_per_chunk == 20
    for results, words in (
        ({8: 2, 4: 2}, "writes 24 bytes per chunk, needs 20"),
        ({8: 1, 4: 2}, "writes 16 bytes per chunk as far as can be seen, needs 20"),
    ):
        assert findings(variant, facts(body({16: 2}, {}, results=results))) == [words]


def test_a_program_adds_to_each_counter_once():
    (found,) = findings(cast.variant(FULL, HALF), facts(body({16: 4}, {8: 4}, atomics=2)))
    assert found == "2 atomics per thread, expected 1"
    full = body({16: 2}, {}, results={8: 1, 4: 3}, atomics=5)
    (found,) = findings(_chunks.variant(HALF, True), facts(full))
    assert found == "5 atomics per thread, expected 4"


def test_threads_that_wait_for_nobody_add_as_often_as_declared():
    variant = dataclasses.replace(MIXED, additions=2)
    for atomics in (0, 1, 2):
        assert findings(variant, facts(dataclasses.replace(GOOD, atomics=atomics))) == []
    (found,) = findings(variant, facts(dataclasses.replace(GOOD, atomics=3)))
    assert found == "3 atomics per thread, expected 2"


def test_contraction_is_no_offence_where_it_is_declared():
    assert findings(dataclasses.replace(MIXED, enable_fp_fusion=True), facts(GOOD, fused=1)) == []


def test_needed_bytes_follow_from_the_dtypes():
    assert [unscale.variant(*pair).bytes_needed for pair in ((HALF, HALF), (HALF, FULL))] == [4, 6]
    assert needed_widths([HALF, FULL], [HALF, FULL]) == {8: 4, 16: 4}
    assert needed_widths([HALF], [HALF]) == {16: 8}
