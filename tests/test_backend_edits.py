"""Weights that others wrote to, on the CPU backends: in a pass of its own, and in the update."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import _c_adopt, _c_command, _c_compiler, _c_update, compiled, cpu, reference
from mpcore.errors import ArgumentError, BackendError

from mpcore_testing.adoptions import VALUES, adopt, expected, near, rounded, write_to
from mpcore_testing.batches import (
    BRAIN,
    COMBINATIONS,
    FULL,
    HALF,
    KINDS,
    OPTIONS,
    Batch,
    Hyper,
    make_batch,
    make_grads,
)
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import HALVES, all_patterns, assert_same_bits, random_bits
from mpcore_testing.strategies import float32_bits
from mpcore_testing.updates import assert_same_batches

SPAN, CHUNK = 4096, 2**16  # what is looked at at once, and what a thread takes
SIZES = [0, 1, 7, 15, 16, 17, 300, SPAN + 5, CHUNK + SPAN + 1]
# of vectors, of spans, and of chunks
BORDERS = [0, 1, 14, 15, 16, 31, 32, SPAN - 1, SPAN, SPAN + 4, CHUNK - 1, CHUNK, CHUNK + SPAN]
WITH_WEIGHTS = [pair for pair in COMBINATIONS if pair[1] is not None]
ADAM, SGD = KINDS[0], KINDS[2]


def named(kind):
    return "-".join(map(str, kind[:2]))


def assert_adopted(weights, masters):
    """Runs the pass in C on copies, which may be views, and NumPy on the originals."""
    held = [torch.empty_like(m).copy_(m) for m in masters]
    before = [w.clone() for w in weights]
    counts = torch.full((len(weights), 2), 2**40, dtype=torch.int64)
    compiled.adopt_(weights, held, counts)
    for weight, kept, one, master, found in zip(
        weights, before, held, masters, counts.tolist(), strict=True
    ):
        assert_same_bits(weight, kept)
        values, wanted = expected(weight.contiguous(), master.contiguous())
        assert_same_bits(one.contiguous(), values)
        assert [count - 2**40 for count in found] == wanted


LEVELS = [name for name, _ in _c_command.levels(_c_command.platform.machine()).values()]


@pytest.fixture(params=["native", "portable", *LEVELS])
def library(request, monkeypatch):
    """The passes for this processor, with or without conversions, and those of a package."""
    if request.param == "native":
        return
    if request.param == "portable":
        found = _c_compiler.load(f'#define PORTABLE\n#include "{_c_command.SOURCE}"')
    else:
        best = _c_compiler.find_built()
        if best is None or LEVELS.index(request.param) < [n in best.name for n in LEVELS].index(1):
            pytest.skip("this processor does not have these instructions")
        name = f"passes-{request.param}-{_c_command.identity()}.so"
        found = ctypes.CDLL(str(best.with_name(name)))
    monkeypatch.setattr(_c_adopt, "passes", lambda: found)
    monkeypatch.setattr(_c_update, "passes", lambda: found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("library")
def test_all_patterns_beside_masters_of_all_kinds(dtype):
    weight = all_patterns(dtype)
    masters = [weight.float(), near(weight, 1), random_bits(2**16, FULL, seed=2)]
    masters += [torch.full((2**16,), value) for value in (torch.nan, torch.inf, -3.4e38, 0.0)]
    assert_adopted([weight] * len(masters), masters)
    for master in masters:  # whole spans that fit
        fitting = torch.from_numpy(rounded(master, dtype).view("int16").copy()).view(dtype)
        assert expected(fitting, master)[1] == [0, 0]
        assert_adopted([fitting], [master])


@pytest.mark.parametrize("place", [0, 15, 16, SPAN - 1, SPAN, 3 * SPAN - 1, 3 * SPAN, 3 * SPAN + 4])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", HALVES)
def test_one_element_is_found_wherever_it_is(dtype, value, place):
    master = torch.linspace(-1, 1, 3 * SPAN + 5)
    weight = master.to(dtype)
    weight[place] = value
    assert expected(weight, master)[1] in ([1, 0], [0, 1])
    assert_adopted([weight], [master])


@pytest.mark.parametrize(
    ("dtype", "master", "word", "count"),
    [
        (HALF, 1e6, 0x7C00, [0, 1]),  # an infinity that is no clamped weight
        (BRAIN, 3.4e38, 0x7F80, [0, 1]),
        (HALF, -1e6, -0x400, [0, 1]),
        (BRAIN, float.fromhex("-0x1.ffp127"), -0x80, [0, 1]),
        (HALF, torch.nan, 0, [1, 0]),
        (BRAIN, torch.nan, -0x8000, [1, 0]),  # a NaN whose bits carry into the sign
    ],
)
@pytest.mark.usefixtures("library")
def test_what_a_rounding_without_clamps_would_take_for_a_fit(dtype, master, word, count):
    masters = torch.ones(SPAN)
    weights = masters.to(dtype)
    masters[5] = master
    if master != master:
        masters.view(torch.int32)[5] = 0x7FFFFFFF
    weights.view(torch.int16)[5] = word
    assert expected(weights, masters)[1] == count
    assert_adopted([weights], [masters])


@given(
    masters=st.lists(float32_bits(), min_size=1, max_size=40),
    words=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=40, max_size=40),
    dtype=st.sampled_from(HALVES),
)
def test_any_bits(masters, words, dtype):
    master = torch.tensor(masters, dtype=torch.int32).view(FULL)
    weight = torch.tensor(words[: len(masters)], dtype=torch.int16).view(dtype)
    assert_adopted([weight], [master])


def test_many_tensors_of_mixed_sizes_dtypes_and_layouts():
    weights = [random_bits(n, HALVES[i % 2], seed=i) for i, n in enumerate(SIZES * 2)]
    masters = [near(weight, i) for i, weight in enumerate(weights)]
    boxes = [random_bits(60, HALF, seed=i).view(3, 4, 5) for i in range(4)]
    wide = [near(box.flatten(), 9).view(3, 4, 5) for box in boxes]
    laid = [lambda t: t.permute(2, 0, 1), lambda t: t[:, ::2], lambda t: t[1:], lambda t: t]
    weights += [lay(box) for lay, box in zip(laid, boxes, strict=True)]
    masters += [lay(box) for lay, box in zip(laid, wide, strict=True)]
    weights.append(boxes[0].transpose(0, 1))  # beside a master that lies in another order
    masters.append(wide[0].transpose(0, 1).contiguous())
    assert_adopted(weights, masters)


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), WITH_WEIGHTS)
@pytest.mark.parametrize("backend", [compiled, reference], ids=["compiled", "reference"])
def test_steps_after_edits_are_those_of_numpy_skipped_or_not(backend, kind, grad, weight):
    rule, moments, numbers = kind
    twin = Twin(rule, [make_batch(moments, weight, SIZES, steps=0.0)], "cpu", backend=backend)
    for step, found_inf in enumerate([1, 0, -1, 0]):
        for batches in (twin.expected, twin.actual):
            write_to(batches[0], BORDERS[step:])
        grads = [make_grads(twin.expected[0], grad, 50 * step)]
        counts = twin.step_after_edits(grads, Hyper.of(numbers), found_inf)
        assert counts[-1].min() > 0


@pytest.mark.parametrize("options", [ADAM, OPTIONS[7]], ids=named)
@pytest.mark.parametrize("found_inf", [0, 1])
def test_the_cpu_backend_adopts_before_it_updates(found_inf, options):
    """What its update computes is torch's."""
    rule, moments, numbers = options
    weights = (HALF, None, BRAIN)
    batches = [make_batch(moments, w, SIZES, seed=i) for i, w in enumerate(weights)]
    for batch in batches:
        write_to(batch, BORDERS)
    grads = [make_grads(b, w or FULL, 9) for b, w in zip(batches, weights, strict=True)]
    runs = []
    for adopts in (True, False):
        here = [batch.on("cpu") for batch in batches]
        plan = cpu.plan_update(rule, here)
        cpu.prepare_(plan, Hyper.of(numbers))
        edits = torch.zeros(2 * len(SIZES), 2, dtype=torch.int64) if adopts else None
        counts = edits if adopts else adopt(here)
        go, saturated = torch.tensor(found_inf, dtype=torch.int32), torch.tensor(0)
        cpu.update_(plan, grads, torch.tensor(0.37), go, saturated, edits=edits)
        runs.append((here, counts.tolist(), saturated.item()))
    assert_same_batches(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert min(map(sum, zip(*runs[0][1], strict=True))) > 0


@pytest.mark.parametrize("streaming", [1, 2**24])
def test_batches_have_their_rows_and_gradients_may_be_of_any_dtype(streaming, monkeypatch):
    monkeypatch.setattr(_c_update, "_STREAMING", streaming)
    rule, moments, numbers = ADAM
    weights = (HALF, None, BRAIN, HALF)
    batches = [make_batch(moments, w, SIZES, seed=i) for i, w in enumerate(weights)]
    for batch, borders in zip(batches, (BORDERS, [], BORDERS[:4], []), strict=True):
        write_to(batch, borders)
    grads = [make_grads(batch, FULL, 9) for batch in batches]
    grads[0][::2] = [grad.half() for grad in grads[0][::2]]
    twin = Twin(rule, batches, "cpu", backend=compiled)
    counts = twin.step_after_edits(grads, Hyper.of(numbers))
    assert counts[: len(SIZES)].sum() > 0
    assert counts[2 * len(SIZES) :].sum() == 0


def test_the_number_of_threads_shows_in_no_bit_and_no_count():
    rule, moments, numbers = ADAM
    batch = make_batch(moments, HALF, [5 * CHUNK + 11, 700, 2 * CHUNK])
    batch.weights[0] = near(batch.masters[0].half(), 1).half()
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for found_inf in (0, 1):
                twin = Twin(rule, [batch], "cpu", backend=compiled)
                twin.step_after_edits([make_grads(batch, HALF, 3)], Hyper.of(numbers), found_inf)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "backend", [compiled, cpu, reference], ids=["compiled", "cpu", "reference"]
)
@pytest.mark.parametrize(
    "edits",
    [
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(2, 2),
        torch.zeros(2, 2, dtype=torch.int64).t(),
    ],
)
def test_counters_that_do_not_fit_are_refused_and_nothing_is_written(backend, edits):
    batch = make_batch(0, HALF, [3, 5])
    twin = Twin("sgd", [batch], "cpu", backend=backend)
    backend.prepare_(twin.plan, Hyper.of(SGD[2]))
    grads = [make_grads(batch, HALF, 1)]
    with pytest.raises(ArgumentError, match=r"edits: expected int64 \[2, 2\], contiguous"):
        twin.update(grads, 0.37, edits=edits)
    assert_same_batches(twin.actual, twin.expected)
    twin.update(grads, 0.37)  # still prepared


def test_a_compiler_that_refuses_leaves_everything_as_it_was(monkeypatch):
    weight, master = torch.ones(3).half(), torch.zeros(3)
    monkeypatch.setattr(_c_adopt, "passes", lambda: _c_compiler.load("nonsense, once more"))
    with pytest.raises(BackendError, match="to compile"):
        compiled.adopt_([weight], [master], torch.zeros(1, 2, dtype=torch.int64))
    assert not master.any()


def test_weights_that_lie_at_odd_addresses():
    flat = make_batch(2, HALF, [1001])
    write_to(flat, BORDERS)
    masters, weights, *moments = [[p[0][1:]] for p in (flat.masters, flat.weights, *flat.moments)]
    odd = Batch(masters, weights, moments, flat.steps, [0])
    both = Twin("adam", [odd], "cpu", placed=[odd], backend=compiled)
    both.step_after_edits([make_grads(odd, HALF, 3)], Hyper.of(ADAM[2]))
