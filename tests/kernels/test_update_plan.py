"""What a plan keeps from step to step, how many launches a step takes, and when it is prepared."""

import pytest
import torch

import mpcore_kernels
from mpcore_kernels import Launcher
from mpcore_kernels._update_kernel import CHUNK
from mpcore_testing.batches import (
    BRAIN,
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

RULE, MOMENTS, NUMBERS = OPTIONS[0]
HYPER = Hyper.of(NUMBERS)


def named(kind):
    return "-".join(map(str, kind[:2]))


def small(dtypes, count, **options):
    """Batches of many small tensors, one for each (gradient, weight)."""
    sizes = [1 + i % 3 for i in range(count)]
    return [make_batch(MOMENTS, weight, sizes, **options) for _, weight in dtypes]


def whole_step(launcher, plan, grads, hyper, move):
    """Inspects and updates; returns what was found."""
    device = move.scale.device
    everything = [grad for batch in grads for grad in batch]
    found = launcher.inspect(everything, scalar(0.5, FULL, device), 1.0, plan=plan, hyper=hyper)
    arguments = (found.coefficient, found.found_inf, scalar(0, torch.int64, device))
    launcher.update_(plan, grads, *arguments, then=move)
    return found


@pytest.mark.parametrize(
    ("dtypes", "launches"),
    [([(HALF, HALF)], 3), ([(FULL, None)], 3), ([(HALF, HALF), (FULL, None)], 5)],
)
@pytest.mark.parametrize("tensors", [1, 40])
def test_a_step_takes_three_launches_or_five_with_two_dtypes(
    dtypes, launches, tensors, device, launched
):
    batches = small(dtypes, tensors, groups=[i % 4 for i in range(tensors)])
    batches = [batch.on(device) for batch in batches]
    plan = mpcore_kernels.plan_update(RULE, batches)
    launcher, hyper, move = Launcher(), Hyper.of(*[NUMBERS] * 4), Move.on(device)
    grads = [
        [g.to(device) for g in make_grads(b, d, 1)]
        for b, (d, _) in zip(batches, dtypes, strict=True)
    ]
    for _ in range(2):
        launched.clear()
        whole_step(launcher, plan, grads, hyper, move)
        assert len(launched) == launches
    assert move.counters[0].item() == 2


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("bad", [False, True])
def test_inspect_prepares_as_prepare_does(kind, bad, device):
    rule, moments, numbers = kind
    parts = [make_batch(moments, weight, [3, 0, CHUNK + 1], steps=0.0) for weight in (HALF, None)]
    twin, hyper, launcher = Twin(rule, parts, device), Hyper.of(numbers), Launcher()
    for step in range(3):
        grads = [make_grads(b, d, step) for b, d in zip(parts, (HALF, FULL), strict=True)]
        if bad and step != 1:
            grads[1][2][-1] = torch.inf
        placed = [grad.to(device) for batch in grads for grad in batch]
        half = scalar(0.5, FULL, device)
        found = launcher.inspect(placed, half, 1.0, plan=twin.plan, hyper=hyper)
        plain = launcher.inspect(placed, half, 1.0)
        for name, value in vars(plain).items():
            if value is not None:
                assert torch.equal(getattr(found, name).nan_to_num(), value.nan_to_num()), name
        assert found.found_inf.item() == (bad and step != 1)
        coefficient, found_inf = found.coefficient.item(), found.found_inf.item()
        twin.update(grads, coefficient, found_inf)
        twin.follow(grads, hyper, coefficient, found_inf)


def test_inspect_prepares_more_tensors_than_one_program_does(device):
    batch = make_batch(MOMENTS, HALF, [2] * 300, groups=[i % 3 for i in range(300)])
    twin, hyper = Twin(RULE, [batch], device), Hyper.of(*[NUMBERS] * 3)
    grads = [make_grads(batch, HALF, 1)]
    mpcore_kernels.inspect([], scalar(1.0, FULL, device), None, plan=twin.plan, hyper=hyper)
    twin.update(grads, 0.5)
    twin.follow(grads, hyper, 0.5)


def test_an_update_needs_a_plan_prepared_since_the_last_one(device):
    batch = make_batch(MOMENTS, HALF, [3])
    twin, grads = Twin(RULE, [batch], device), [make_grads(batch, HALF, 1)]
    with pytest.raises(RuntimeError, match=r"^update_: expected a plan that was prepared since"):
        twin.update(grads, 0.5)
    twin.step(grads, HYPER)
    move = Move.on(device)
    with pytest.raises(RuntimeError, match=r"^update_: expected a plan that was prepared since"):
        twin.update(grads, 0.5, then=move)
    assert move.values() == Move.on(device).values()
    # nothing was written
    twin.step(grads, HYPER)


def test_preparing_twice_is_preparing_for_the_second(device):
    batch = make_batch(MOMENTS, HALF, [3])
    twin = Twin(RULE, [batch], device)
    mpcore_kernels.prepare_(twin.plan, Hyper.of(tuple(2 * n for n in NUMBERS)))
    twin.step([make_grads(batch, HALF, 1)], HYPER)


def test_a_step_uploads_addresses_and_numbers_once_and_only_if_they_changed(device, uploads):
    batches = [make_batch(MOMENTS, weight, [5] * 7).on(device) for weight in (HALF, None)]
    plan = mpcore_kernels.plan_update(RULE, batches)
    launcher, move = Launcher(), Move.on(device)
    grads = [[torch.ones_like(w) for w in batches[0].weights], batches[1].on(device).masters]
    other = [[torch.ones_like(g) for g in batch] for batch in grads]
    uploads.clear()
    whole_step(launcher, plan, grads, HYPER, move)
    numbers, addresses = 1 + len(NUMBERS), 14
    assert sorted(uploads) == sorted([numbers, addresses])
    whole_step(launcher, plan, grads, Hyper.of(NUMBERS), move)
    assert len(uploads) == 2
    whole_step(launcher, plan, other, HYPER, move)
    assert uploads[2:] == [addresses]
    whole_step(launcher, plan, grads, Hyper.of((0.5, *NUMBERS[1:])), move)
    assert uploads[3:] == [numbers]
    # another order of the same tensors is another table
    whole_step(launcher, plan, [grads[0][::-1], grads[1]], HYPER, move)
    assert uploads[4:] == [addresses]


def test_numbers_are_told_apart_by_their_bits(device, uploads):
    batch = make_batch(0, None, [1], steps=None)
    batch.masters[0].fill_(-0.0)
    twin = Twin("sgd", [batch], device)
    for weight_decay in (0.0, -0.0, 0.0):
        # the gradient plus -0 times a decay: the sign of the sum shows which zero it was
        twin.step([[torch.full((1,), -0.0)]], Hyper.of((-1.0, 0.0, 0.0, weight_decay, 0.0, 0.0)))
    assert len([n for n in uploads if n == 7]) == 2


def test_gradients_of_changing_addresses_and_dtypes_are_followed(device):
    batch = make_batch(MOMENTS, HALF, [40, 7])
    twin = Twin(RULE, [batch], device)
    kept = []
    for step in range(20):
        dtype = (HALF, FULL)[step % 2]
        kept.append([torch.empty(step, device=device)])  # moves what is allocated next
        twin.step([make_grads(batch, dtype, step)], HYPER)


def test_a_capture_finds_what_a_step_before_it_uploaded(device, capturing, uploads):
    batch = make_batch(MOMENTS, HALF, [5]).on(device)
    plan, launcher = mpcore_kernels.plan_update(RULE, [batch]), Launcher()
    grads, move = [[torch.ones_like(w) for w in batch.weights]], Move.on(device)
    whole_step(launcher, plan, grads, HYPER, move)
    uploads.clear()
    capturing.now = True
    whole_step(launcher, plan, grads, HYPER, move)
    assert uploads == []
    mpcore_kernels.prepare_(plan, HYPER)
    before = [t.clone() for t in batch.everything()]
    with pytest.raises(RuntimeError, match="got hyper-parameters that are new"):
        mpcore_kernels.prepare_(plan, Hyper.of((0.5, *NUMBERS[1:])))
    new = [[torch.ones_like(grads[0][0])]]
    state = (scalar(1.0, FULL, device), scalar(0, torch.int32, device))
    with pytest.raises(RuntimeError, match="got gradients that are new"):
        mpcore_kernels.update_(plan, new, *state, scalar(0, torch.int64, device))
    assert all(map(torch.equal, batch.everything(), before))
    with pytest.raises(RuntimeError, match="expected no capture of a CUDA graph"):
        mpcore_kernels.plan_update(RULE, [batch])


def test_a_plan_keeps_its_tensors_alive(device):
    plan = mpcore_kernels.plan_update(RULE, [make_batch(MOMENTS, BRAIN, [5]).on(device)])
    garbage = [torch.full((5,), -1.0, device=device) for _ in range(100)]
    mpcore_kernels.prepare_(plan, HYPER)
    state = (scalar(1.0, FULL, device), scalar(0, torch.int32, device))
    grads = [[torch.ones(5, dtype=BRAIN, device=device)]]
    mpcore_kernels.update_(plan, grads, *state, scalar(0, torch.int64, device))
    assert all((g == -1.0).all() for g in garbage)
    assert plan.parts[0].batch.steps[0].item() == 4.0
