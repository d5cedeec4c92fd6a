"""What plan_update, prepare_ and update_ refuse, in words, with nothing written."""

import dataclasses
import re

import pytest
import torch

import mpcore_kernels
from mpcore_testing.batches import (
    BRAIN,
    FULL,
    HALF,
    OPTIONS,
    Batch,
    Hyper,
    Move,
    make_batch,
    make_grads,
    scalar,
)
from mpcore_testing.kernels import assert_same_bits

RULE, MOMENTS, NUMBERS = OPTIONS[0]
HYPER = Hyper.of(NUMBERS)


def pair(device, weight=HALF):
    """A batch of two tensors."""
    return make_batch(MOMENTS, weight, [3, 4]).on(device)


def changed(batch, **changes):
    return dataclasses.replace(batch, **changes)


def refused(error, message, call, *arguments, **options):
    with pytest.raises(error, match="^" + re.escape(message)):
        call(*arguments, **options)


def test_plan_update_refuses_rules_that_it_does_not_know(device):
    message = "rule: expected one of adam, sgd, adagrad, lion, got 'adamax'."
    refused(ValueError, message, mpcore_kernels.plan_update, "adamax", [pair(device)])


def test_plan_update_refuses_batches_that_do_not_fit(device):
    batch = pair(device)
    masters, weights, (mean, square) = batch.masters, batch.weights, batch.moments
    one = "batches[1]"
    cases = {
        f"{one}.masters[1]: expected torch.float32, got torch.float16": {
            "masters": [masters[0], weights[1]]
        },
        f"{one}.weights[0]: expected torch.float16 or torch.bfloat16, got": {"weights": masters},
        f"{one}.weights: expected one dtype, got several": {
            "weights": [weights[0], weights[1].bfloat16()]
        },
        f"{one}.weights: expected 2 tensors, one for each of {one}.masters": {
            "weights": weights[:1]
        },
        f"{one}.weights[1]: expected the layout of {one}.masters[1]": {
            "weights": [weights[0], weights[1].view(2, 2)]
        },
        f"{one}.moments: expected 2 or 3 lists for 'adam', got 1": {"moments": [mean]},
        f"{one}.moments[1]: expected 2 tensors": {"moments": [mean, square[:1]]},
        f"{one}.moments[0][0]: expected torch.float32, got torch.float64": {
            "moments": [[mean[0].double(), mean[1]], square]
        },
        f"{one}.moments[1][1]: expected the layout": {
            "moments": [mean, [square[0], square[1][:3].clone()]]
        },
        f"{one}.steps: expected a step count for each tensor, got None": {"steps": None},
        f"{one}.steps: expected a 0-d tensor for each": {"steps": batch.steps[:1]},
        f"{one}.steps[0]: expected torch.float32, got torch.int64": {
            "steps": [batch.steps[0].long(), batch.steps[1]]
        },
        f"{one}.groups: expected the index of a param group": {"groups": [0, -1]},
    }
    first = make_batch(MOMENTS, BRAIN, [2], seed=9).on(device)
    for message, changes in cases.items():
        batches = [first, changed(batch, **changes)]
        refused(ValueError, message, mpcore_kernels.plan_update, RULE, batches)
    short = changed(batch, steps=[s.view(1) for s in batch.steps])
    message = f"{one}.steps: expected a 0-d tensor for each"
    refused(ValueError, message, mpcore_kernels.plan_update, RULE, [first, short])
    short = changed(batch, groups=[0])
    message = f"{one}.groups: expected the index of a param group for each"
    refused(ValueError, message, mpcore_kernels.plan_update, RULE, [first, short])


def test_plan_update_refuses_what_is_no_tensor_and_other_devices(device):
    batch = pair(device)
    nothing = changed(batch, masters=[batch.masters[0], None])
    message = "batches[0].masters[1]: expected a torch.Tensor, got NoneType."
    refused(TypeError, message, mpcore_kernels.plan_update, RULE, [nothing])
    away = changed(batch, masters=[batch.masters[0], torch.empty(4, device="meta")])
    message = f"batches[0].masters[1]: expected a tensor on {device}"
    refused(ValueError, message, mpcore_kernels.plan_update, RULE, [away])
    meta = Batch([torch.empty(4, device="meta")], None, [], None, [0])
    refused(ValueError, "tensors: expected a", mpcore_kernels.plan_update, "sgd", [meta])


@pytest.mark.parametrize("part", ["masters", "weights", "moments", "steps"])
def test_plan_update_refuses_tensors_that_share_memory(part, device):
    first, second = pair(device), pair(device)
    if part == "moments":
        shared = changed(second, moments=[second.moments[0], first.moments[1]])
    else:
        shared = changed(second, **{part: getattr(first, part)})
    message = "expected memory of its own, got memory shared with"
    with pytest.raises(ValueError, match=message):
        mpcore_kernels.plan_update(RULE, [first, shared])
    mpcore_kernels.plan_update(RULE, [first, second])


def test_prepare_refuses_hyper_parameters_that_do_not_fit(device):
    batch = make_batch(MOMENTS, HALF, [3, 4], groups=[0, 2]).on(device)
    plan = mpcore_kernels.plan_update(RULE, [batch])
    names = "lr, beta1, beta2, eps, weight_decay, decoupled, maximize"
    row = f"hyper.numbers[1]: expected 7 numbers, {names}, got 6."
    short = Hyper.of(NUMBERS, NUMBERS[1:], NUMBERS)
    refused(ValueError, row, mpcore_kernels.prepare_, plan, short)
    number = "hyper: expected a row of numbers and an entry of lrs for each of at least 3"
    refused(ValueError, number, mpcore_kernels.prepare_, plan, Hyper.of(NUMBERS, NUMBERS))
    uneven = Hyper((NUMBERS,) * 3, (None,) * 2)
    refused(ValueError, number, mpcore_kernels.prepare_, plan, uneven)
    for bad in (
        scalar(0.1, torch.float64, device),
        torch.ones(2, device=device),
        torch.ones((), device="meta"),
    ):
        lr = "hyper.lrs[2]: expected a float32 tensor of one element on"
        hyper = Hyper((NUMBERS,) * 3, (None, None, bad))
        refused(ValueError, lr, mpcore_kernels.prepare_, plan, hyper)
    assert not plan.prepared


def test_inspect_refuses_a_plan_without_hyper_parameters_and_the_reverse(device):
    plan = mpcore_kernels.plan_update(RULE, [pair(device)])
    one = scalar(1.0, FULL, device)
    both = "plan, hyper: expected both or none of them, got one."
    refused(ValueError, both, mpcore_kernels.inspect, [], one, None, plan=plan)
    refused(ValueError, both, mpcore_kernels.inspect, [], one, None, hyper=HYPER)
    refused(
        ValueError,
        "hyper: expected a row",
        *(mpcore_kernels.inspect, [], one, None),
        plan=plan,
        hyper=Hyper.of(),
    )
    assert not plan.prepared


class Step:
    """An update with one argument that is wrong."""

    def __init__(self, device, weight=HALF):
        self.batch = pair(device, weight)
        self.before = self.batch.on(device)
        self.plan = mpcore_kernels.plan_update(RULE, [self.batch])
        mpcore_kernels.prepare_(self.plan, HYPER)
        self.move = Move.on(device)
        self.saturated = scalar(5, torch.int64, device)
        self.arguments = {
            "grads": [[g.to(device) for g in make_grads(self.batch, weight or FULL, 1)]],
            "coefficient": scalar(0.5, FULL, device),
            "found_inf": scalar(0, torch.int32, device),
            "saturated": self.saturated,
            "then": self.move,
        }

    def refuse(self, error, message, **changes):
        refused(error, message, mpcore_kernels.update_, self.plan, **(self.arguments | changes))
        for actual, expected in zip(self.batch.everything(), self.before.everything(), strict=True):
            assert_same_bits(actual, expected)
        assert self.saturated.item() == 5
        assert self.move.values() == Move.on(self.saturated.device).values()


def test_update_refuses_gradients_that_do_not_fit(device):
    step = Step(device)
    ((a, b),) = step.arguments["grads"]
    for message, grads in {
        "grads: expected 1 lists, got 2.": [[a, b], []],
        "grads[0]: expected 2 tensors, one for each of masters, got 1": [[a]],
        "grads[0][1]: expected torch.float16 or torch.float32, got torch.bfloat16": [
            [a, b.bfloat16()]
        ],
        "grads[0]: expected one dtype, got several": [[a, b.float()]],
        "grads[0][1]: expected the layout of masters[1]": [[a, b.view(2, 2)]],
        "grads[0][0]: expected the layout of masters[0]": [[b, a]],
        "grads[0][1]: expected a dense tensor": [[a, torch.ones(8, device=device).half()[::2]]],
        "grads[0][1]: expected a tensor on": [[a, torch.empty(4, device="meta").half()]],
        "grads[0][0]: expected a dense tensor": [[torch._neg_view(a), b]],
    }.items():
        step.refuse(ValueError, message, grads=grads)
    freed = torch.ones_like(a)
    freed.untyped_storage().resize_(0)
    message = "grads: expected tensors that hold memory, got one that holds none."
    step.refuse(ValueError, message, grads=[[freed, b]])
    message = "grads[0][0]: expected a torch.Tensor, got NoneType."
    step.refuse(TypeError, message, grads=[[None, b]])
    # float32 parameters have float32 gradients
    message = "grads[0][0]: expected torch.float32, got torch.float16"
    Step(device, None).refuse(ValueError, message, grads=[[a, b]])


@pytest.mark.parametrize("part", ["masters", "weights", "moments"])
def test_update_refuses_gradients_that_share_memory_with_what_is_written(part, device):
    weight = HALF if part == "weights" else None
    step = Step(device, weight)
    tensors = step.batch.moments[1] if part == "moments" else getattr(step.batch, part)
    message = "grads: expected memory of their own, got memory shared with what is updated"
    own = step.arguments["grads"][0]
    step.refuse(ValueError, message, grads=[tensors])
    step.refuse(ValueError, message, grads=[[own[0], tensors[1]]])


def test_update_takes_gradients_that_are_neighbours_of_what_is_written(device):
    flat = torch.arange(9.0, device=device)
    batch = Batch([flat[3:6]], None, [], None, [0])
    plan = mpcore_kernels.plan_update("sgd", [batch])
    state = (scalar(1.0, FULL, device), scalar(0, torch.int32, device))
    for grad in (flat[:3], flat[6:]):
        mpcore_kernels.prepare_(plan, Hyper.of((1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
        mpcore_kernels.update_(plan, [[grad]], *state, scalar(0, torch.int64, device))
    assert flat.tolist() == [0, 1, 2, -3, -4, -5, 6, 7, 8]
    for grad in (flat[1:4], flat[5:8]):
        mpcore_kernels.prepare_(plan, Hyper.of((1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
        with pytest.raises(ValueError, match="memory shared with what is updated"):
            mpcore_kernels.update_(plan, [[grad]], *state, scalar(0, torch.int64, device))


def test_update_refuses_scalars_that_do_not_fit(device):
    step = Step(device)
    for name, bad in {
        "coefficient": scalar(0.5, torch.float64, device),
        "found_inf": scalar(0, torch.int64, device),
        "saturated": scalar(0, torch.int32, device),
    }.items():
        step.refuse(ValueError, f"{name}: expected a contiguous", **{name: bad})
    step.refuse(TypeError, "coefficient: expected a torch.Tensor, got float.", coefficient=0.5)


def test_update_refuses_scalars_on_another_device(device):
    step = Step(device)
    for name in ("found_inf", "saturated"):
        away = step.arguments[name].to("meta")
        step.refuse(ValueError, f"{name}: expected a tensor on {device}", **{name: away})
    step.refuse(ValueError, "tensors: expected a", coefficient=torch.ones((), device="meta"))
    for index in range(4):
        name = list(vars(step.move))[index]
        away = getattr(step.move, name).to("meta")
        move = dataclasses.replace(step.move, **{name: away})
        step.refuse(ValueError, f"{name}: expected a tensor on", then=move)


def test_update_refuses_a_move_that_does_not_fit(device):
    step = Step(device)
    for message, changes in {
        "growth_factor: expected a number above 1": {"growth_factor": 1.0},
        "hysteresis: expected an integer from 1": {"hysteresis": 0},
        "counters: expected a contiguous torch.int64": {"counters": step.move.counters.int()},
        "then[0]: expected memory of its own, got memory shared with coefficient": {
            "scale": step.arguments["coefficient"]
        },
    }.items():
        step.refuse(ValueError, message, then=dataclasses.replace(step.move, **changes))
