"""Updates that make weights which others wrote to masters first: bits and counts."""

import pytest
import torch

import mpcore_kernels
from mpcore_kernels._update_kernel import CHUNK, ROUND
from mpcore_testing.adoptions import VALUES, adopt, near, write_to
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
    scalar,
)
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import HALVES, assert_same_bits, guarded, random_bits
from mpcore_testing.updates import assert_same_batches, update

SIZES = [0, 1, 7, 300, CHUNK, CHUNK + 1]
# of vectors, of what masked bodies take at a time, and of chunks
BORDERS = [0, 1, 3, 4, 7, 8, 255, 256, ROUND - 1, ROUND, CHUNK - 1, CHUNK]
WITH_WEIGHTS = [pair for pair in COMBINATIONS if pair[1] is not None]
SGD = OPTIONS[3]


def named(kind):
    return "-".join(map(str, kind[:2]))


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), WITH_WEIGHTS)
def test_steps_after_edits_are_those_of_numpy_skipped_or_not(kind, grad, weight, device):
    rule, moments, numbers = kind
    twin = Twin(rule, [make_batch(moments, weight, SIZES, steps=0.0)], device)
    for step, found_inf in enumerate([-1, 0]):
        for batches in (twin.expected, twin.actual):
            write_to(batches[0], BORDERS[step:])
        grads = [make_grads(twin.expected[0], grad, 50 * step)]
        counts = twin.step_after_edits(grads, Hyper.of(numbers), found_inf)
        assert counts[-1].min() > 0


@pytest.mark.parametrize("weight", HALVES)
def test_weights_of_any_bits(weight, device):
    rule, moments, numbers = KINDS[0]
    sizes = [2 * CHUNK + 5, CHUNK]
    batch = make_batch(moments, weight, sizes)
    batch.weights = [random_bits(n, weight, seed=n) for n in sizes]
    batch.masters = [near(batch.weights[0], 1), random_bits(CHUNK, FULL, 2)]
    twin = Twin(rule, [batch], device)
    twin.step_after_edits([make_grads(batch, weight, 7)], Hyper.of(numbers))


@pytest.mark.parametrize("found_inf", [0, 1])
def test_weights_that_nobody_wrote_to_leave_every_digit_of_their_masters(found_inf, device):
    rule, moments, numbers = KINDS[0]
    batches = [make_batch(moments, dtype, SIZES, seed=i) for i, dtype in enumerate(HALVES)]
    batches[0].masters[3].fill_(1e6)  # whose weights are clamped
    for batch in batches:
        write_to(batch, [])
    twin = Twin(rule, batches, device)
    grads = [make_grads(b, d, 3) for b, d in zip(batches, HALVES, strict=True)]
    assert twin.step_after_edits(grads, Hyper.of(numbers), found_inf).sum() == 0


def test_every_batch_has_its_rows_and_float32_parameters_have_none(device, launched):
    rule, moments, numbers = KINDS[0]
    weights = (HALF, None, BRAIN)
    batches = [make_batch(moments, w, SIZES, seed=i) for i, w in enumerate(weights)]
    batches.append(make_batch(moments, HALF, []))
    for batch, borders in zip(batches, (BORDERS, [], BORDERS[:4], []), strict=True):
        write_to(batch, borders)
    twin = Twin(rule, batches, device)
    grads = [make_grads(b, w or FULL, 9) for b, w in zip(batches, (*weights, HALF), strict=True)]
    launched.clear()
    counts = twin.step_after_edits(grads, Hyper.of(numbers))
    assert len(counts) == 2 * len(SIZES)
    assert [v.name.endswith("ADOPT=True") for v in launched[1:]] == [True, False, True]


@pytest.mark.parametrize("found_inf", [0, 1])
@pytest.mark.parametrize("moved", ["master", "weight"])
@pytest.mark.parametrize("offset", [1, 4])
def test_nothing_around_tensors_at_odd_addresses_is_touched(moved, offset, found_inf, device):
    rule, _, numbers = SGD
    batch = make_batch(0, HALF, [CHUNK + 5] * 2)
    write_to(batch, BORDERS)
    places = {name: offset * (name == moved) for name in ("master", "weight")}
    masters = [guarded(t, device, places["master"]) for t in batch.masters]
    weights = [guarded(t, device, places["weight"]) for t in batch.weights]
    placed = Batch([m.tensor for m in masters], [w.tensor for w in weights], [], None, [0, 0])
    expected = Batch(batch.masters, batch.weights, [], None, [0, 0])
    plan = mpcore_kernels.plan_update(rule, [placed])
    mpcore_kernels.prepare_(plan, Hyper.of(numbers))
    grads = make_grads(batch, HALF, 5)
    edits = torch.zeros(2, 2, dtype=torch.int64, device=device)
    mpcore_kernels.update_(
        *(plan, [[grad.to(device) for grad in grads]], scalar(0.37, FULL, device)),
        *(scalar(found_inf, torch.int32, device), scalar(0, torch.int64, device)),
        edits=edits,
    )
    counts = adopt([expected])
    update(rule, [expected], [grads], Hyper.of(numbers), 0.37, found_inf)
    assert_same_batches([placed], [expected])
    assert edits.tolist() == counts.tolist()
    for one in (*masters, *weights):
        one.assert_margins_intact()


@pytest.mark.parametrize("value", VALUES)
def test_all_elements_of_chunks_may_be_written_to(value, device):
    batch = make_batch(0, HALF, [CHUNK, CHUNK - 1])
    for weight in batch.weights:
        weight.fill_(value)
    for master in batch.masters:
        master.fill_(1.0)
    rule, _, numbers = SGD
    counts = Twin(rule, [batch], device).step_after_edits(
        [make_grads(batch, HALF, 1)], Hyper.of(numbers)
    )
    finite = value == value and abs(value) < torch.inf
    assert counts[:, 0 if finite else 1].tolist() == [CHUNK, CHUNK - 1]


def test_edits_are_told_to_autograd(device):
    batch = make_batch(0, HALF, [3]).on(device)
    edits = torch.zeros(1, 2, dtype=torch.int64, device=device)
    before = edits._version
    twin = Twin("sgd", [batch], device)
    twin.step([make_grads(batch, HALF, 1)], Hyper.of(SGD[2]), edits=edits)
    assert edits._version > before


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), r"edits: expected a .* of shape \[2, 2\]"),
        (torch.zeros(2, 2), r"edits: expected a contiguous torch.int64 tensor"),
        (torch.zeros(2, 2, dtype=torch.int64).t(), r"edits: expected a contiguous"),
    ],
)
def test_counters_that_do_not_fit_are_refused_and_nothing_is_written(edits, message, device):
    batch = make_batch(0, HALF, [3, 5])
    twin = Twin("sgd", [batch], device)
    twin.backend.prepare_(twin.plan, Hyper.of(SGD[2]))
    grads = [make_grads(batch, HALF, 1)]
    with pytest.raises(ValueError, match=message):
        twin.update(grads, 0.37, edits=edits.to(device))
    assert_same_bits(twin.actual[0].masters[1].cpu(), batch.masters[1])
    twin.update(grads, 0.37)  # still prepared
