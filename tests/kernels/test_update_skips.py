"""Steps that overflow, weights that saturate and loss scales that move, all in one launch."""

import pytest
import torch

import mpcore_kernels
from mpcore_kernels._launch import Variant
from mpcore_kernels._update_kernel import CHUNK
from mpcore_testing.batches import (
    BRAIN,
    COMBINATIONS,
    FULL,
    HALF,
    KINDS,
    OPTIONS,
    Hyper,
    Move,
    make_batch,
    make_grads,
    scalar,
)
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import random_bits
from mpcore_testing.updates import assert_same_batches

RULE, MOMENTS, NUMBERS = OPTIONS[0]
LARGEST = {HALF: 65504.0, BRAIN: (2.0**8 - 1) * 2.0**120}


def named(kind):
    return "-".join(map(str, kind[:2]))


@pytest.mark.parametrize("found_inf", [1, 2, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_skipped_step_changes_nothing(kind, found_inf, device):
    rule, moments, numbers = kind
    batch = make_batch(moments, HALF, [0, 1, 2 * CHUNK + 3], make=random_bits)
    # not the master rounded, so that a weight written again would show
    batch.weights = [torch.full_like(weight, 7.0) for weight in batch.weights]
    twin = Twin(rule, [batch], device)
    twin.step([make_grads(batch, HALF, 9, random_bits)], Hyper.of(numbers), found_inf=found_inf)
    assert_same_batches(twin.actual, [batch])
    assert twin.saturated.item() == 1000


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), COMBINATIONS)
def test_step_counts_are_right_when_steps_are_skipped_the_first_one_too(kind, grad, weight, device):
    rule, moments, numbers = kind
    batch = make_batch(moments, weight, [0, 40], steps=0.0)
    twin = Twin(rule, [batch], device)
    for step, found_inf in enumerate([1, 1, 0, 1, 0, 0]):
        twin.step([make_grads(batch, grad, step)], Hyper.of(numbers), found_inf=found_inf)
    assert [step.item() for step in twin.actual[0].steps] == [3.0, 3.0]


@pytest.mark.parametrize("weight", [HALF, BRAIN])
@pytest.mark.parametrize("grad", ["weight", "full"])
def test_clamped_weights_are_counted_over_all_chunks_and_tensors(weight, grad, device):
    batch = make_batch(0, weight, [3 * CHUNK, 5, CHUNK + 1], steps=None)
    for master in batch.masters:
        master.zero_()
    large = 3.4e38 if weight == BRAIN else 7e4
    batch.masters[0][[0, 1, 2, 3, CHUNK - 1, CHUNK, 3 * CHUNK - 1]] = large
    batch.masters[1][4] = -large
    batch.masters[2][CHUNK] = float("inf")
    twin = Twin("sgd", [batch], device)
    grads = [torch.zeros_like(m, dtype=weight if grad == "weight" else FULL) for m in batch.masters]
    twin.step([grads], Hyper.of((0.0,) * 6))
    assert twin.saturated.item() == 1008
    assert twin.actual[0].weights[1].tolist() == [0, 0, 0, 0, -LARGEST[weight]]
    # an infinity times a decay of 0, and no finite value that was clamped
    assert twin.actual[0].weights[2][-1].isnan()


def test_every_weight_of_a_chunk_may_be_clamped(device):
    batch = make_batch(0, HALF, [CHUNK, CHUNK - 1], steps=None)
    for master in batch.masters:
        master.fill_(1e6)
    twin = Twin("sgd", [batch], device)
    twin.step([[torch.zeros_like(m, dtype=HALF) for m in batch.masters]], Hyper.of((0.0,) * 6))
    assert twin.saturated.item() == 1000 + 2 * CHUNK - 1


HISTORY = [1, 0, 0, 1, 1, 0, 0, 0, 0, -1]
SCALES = [512, 512, 1024, 512, 256, 256, 512, 512, 1024, 512]


@pytest.mark.parametrize("batches", [1, 2])
def test_the_scale_moves_once_with_every_update_skipped_or_not(batches, device, launched):
    parts = [
        make_batch(MOMENTS, weight, [3, CHUNK + 1], seed=i)
        for i, weight in enumerate([HALF, None][:batches])
    ]
    twin = Twin(RULE, parts, device)
    move = Move.on(device)
    launched.clear()
    for step, (found_inf, scale) in enumerate(zip(HISTORY, SCALES, strict=True)):
        grads = [make_grads(b, d, step) for b, d in zip(parts, (HALF, FULL), strict=False)]
        twin.step(grads, Hyper.of(NUMBERS), found_inf=found_inf, then=move)
        skipped = sum(map(bool, HISTORY[: step + 1]))
        assert (move.scale.item(), *move.values()[3:5]) == (scale, step + 1, skipped)
    assert len(launched) == len(HISTORY) * (1 + batches)


def test_the_scale_moves_in_the_last_launch(device, monkeypatch):
    parts = [make_batch(MOMENTS, HALF, [3], seed=i) for i in range(3)]
    twin, move = Twin(RULE, [*parts, make_batch(MOMENTS, HALF, [])], device), Move.on(device)
    found = []

    def recorded(variant, programs, arguments):
        if variant.name.startswith("update"):
            moves, *state = arguments[8:14]
            assert all(a is b for a, b in zip(state, vars(move).values(), strict=False))
            found.append(moves)
        launch(variant, programs, arguments)

    launch = Variant.launch
    monkeypatch.setattr(Variant, "launch", recorded)
    grads = [*(make_grads(part, HALF, 1) for part in parts), []]
    twin.step(grads, Hyper.of(NUMBERS), then=move)
    assert found == [0, 0, 1]


@pytest.mark.parametrize("found_inf", [0, 1])
def test_the_scale_moves_as_update_scale_moves_it(found_inf, device):
    batch = make_batch(MOMENTS, HALF, [3])
    twin = Twin(RULE, [batch], device)
    move, other = Move.on(device), Move.on(device)
    for _ in range(5):
        twin.step([make_grads(batch, HALF, 1)], Hyper.of(NUMBERS), found_inf=found_inf, then=move)
        mpcore_kernels.update_scale_(other, scalar(found_inf, torch.int32, device))
        assert move.values() == other.values()


@pytest.mark.parametrize("batches", [[], [make_batch(2, HALF, [])]])
def test_the_scale_moves_without_anything_to_update(batches, device):
    twin = Twin(RULE, batches, device)
    move = Move.on(device)
    twin.step([[] for _ in batches], Hyper.of(NUMBERS), found_inf=1, then=move)
    assert move.values() == [512.0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_the_scale_is_told_to_autograd(device):
    batch = make_batch(0, None, [3])
    twin, move = Twin("sgd", [batch], device), Move.on(device)
    versions = [t._version for t in list(vars(move).values())[:4]]
    twin.step([make_grads(batch, FULL, 1)], Hyper.of((0.1,) + (0.0,) * 5), then=move)
    after = [t._version for t in list(vars(move).values())[:4]]
    assert all(a > b for a, b in zip(after, versions, strict=True))
