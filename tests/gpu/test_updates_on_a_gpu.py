"""Fused updates on a real device: NumPy's bits, no syncs, and graphs across overflows."""

import pytest
import torch

import mpcore_kernels
from mpcore_kernels import Launcher
from mpcore_kernels._update_kernel import CHUNK
from mpcore_testing.batches import (
    COMBINATIONS,
    FULL,
    HALF,
    OPTIONS,
    Hyper,
    Move,
    make_batch,
    make_grads,
    scalar,
)
from mpcore_testing.fused import Twin
from mpcore_testing.gpu import DEVICE, ON_A_GPU, captured, many, no_sync, rehearsed
from mpcore_testing.kernels import random_bits, random_finite
from mpcore_testing.marks import needs_a_gpu
from mpcore_testing.updates import assert_same_batches, update

pytestmark = pytest.mark.gpu

SIZES = [0, 1, 7, CHUNK + 1]
if ON_A_GPU:
    SIZES += [CHUNK - 1, CHUNK, 70 * CHUNK + 5]
OVERFLOWS = [0, 3, 4]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda values: "-".join(map(str, values[:2])))
@pytest.mark.parametrize(("grad", "weight"), rehearsed(COMBINATIONS, 1))
@pytest.mark.parametrize("make", [random_finite, random_bits])
def test_updates_give_the_bits_of_numpy_on_the_device(options, grad, weight, make):
    rule, moments, numbers = options
    batch = make_batch(moments, weight, SIZES, steps=0.0, make=make)
    twin = Twin(rule, [batch], DEVICE)
    for step in range(many(4, 2)):
        grads = [make_grads(batch, grad, 50 * step, make)]
        twin.step(grads, Hyper.of(numbers), found_inf=int(step == 0))


def test_every_step_count_gives_the_bits_of_numpy_on_the_device():
    rule, moments, numbers = OPTIONS[0]
    batch = make_batch(moments, HALF, [5] * many(500, 20))
    batch.steps = [torch.tensor(float(i * i * 64)) for i in range(len(batch.masters))]
    Twin(rule, [batch], DEVICE).step([make_grads(batch, HALF, 1)], Hyper.of(numbers))


class Training:
    """Batches at fixed addresses on the device, and one step over them."""

    def __init__(self, rule, moments):
        self.rule = rule
        parts = [make_batch(moments, weight, SIZES, steps=0.0) for weight in (HALF, None)]
        self.expected = parts
        self.batches = [part.on(DEVICE) for part in parts]
        self.grads = [
            [torch.zeros_like(m, dtype=dtype) for m in batch.masters]
            for batch, dtype in zip(self.batches, (HALF, FULL), strict=True)
        ]
        self.launcher = Launcher()
        self.plan = self.launcher.plan_update(rule, self.batches)
        self.lr = scalar(0.1, FULL, DEVICE)
        self.move = Move.on(DEVICE)
        self.coefficient = scalar(0.0, FULL, DEVICE)
        self.saturated = scalar(0, torch.int64, DEVICE)
        self.found = None

    def load(self, step):
        """Puts the gradients of a step in place, and returns them on the host."""
        host = [
            make_grads(batch, dtype, 10 * step)
            for batch, dtype in zip(self.expected, (HALF, FULL), strict=True)
        ]
        if step in OVERFLOWS:
            host[step % 2][-1][-1] = torch.inf
        for ours, theirs in zip(self.grads, host, strict=True):
            for grad, value in zip(ours, theirs, strict=True):
                grad.copy_(value)
        return host

    def step(self, numbers):
        hyper = Hyper((numbers,), (self.lr,))
        torch.reciprocal(self.move.scale, out=self.coefficient)
        everything = [grad for batch in self.grads for grad in batch]
        self.found = self.launcher.inspect(
            everything, self.coefficient, 1.0, plan=self.plan, hyper=hyper
        )
        self.launcher.update_(
            *(self.plan, self.grads, self.found.coefficient, self.found.found_inf, self.saturated),
            then=self.move,
        )

    def state(self):
        tensors = [tensor for batch in self.batches for tensor in batch.everything()]
        return [*tensors, *self.move.tensors(), self.saturated]


@pytest.mark.parametrize(
    "options", rehearsed(OPTIONS, 2), ids=lambda values: "-".join(map(str, values[:2]))
)
def test_a_captured_step_is_replayed_across_overflows_the_first_one_too(options):
    rule, moments, numbers = options
    training = Training(rule, moments)
    replay = captured(lambda: training.step(numbers), training.state())
    scale = 1024.0
    for step in range(8):
        # a schedule, in the tensor that the graph reads
        training.lr.fill_(0.1 / (step + 1))
        host = training.load(step)
        replay()
        found_inf = training.found.found_inf.item()
        assert found_inf == int(step in OVERFLOWS)
        hyper = Hyper((numbers,), (training.lr.cpu(),))
        arguments = (host, hyper, training.found.coefficient.item(), found_inf)
        update(rule, training.expected, *arguments)
        assert_same_batches(training.batches, training.expected)
        scale = scale / 2 if step in OVERFLOWS else scale
        # two good steps in a row let it grow
        scale = scale * 2 if step in (2, 6) else scale
        assert training.move.scale.item() == scale
    assert training.move.values()[3:5] == [8, len(OVERFLOWS)]


def test_updates_never_wait_for_the_device():
    rule, moments, numbers = OPTIONS[0]
    training = Training(rule, moments)
    with no_sync():
        for step in range(3):
            training.step((0.1 * (step + 1), *numbers[1:]))
            plan = training.launcher.plan_update(rule, training.batches)
            training.launcher.prepare_(plan, Hyper.of(numbers))


def test_an_update_gives_the_same_bits_every_time():
    rule, moments, numbers = OPTIONS[0]
    batch = make_batch(moments, HALF, [many(10**6, 10**4) + 3])
    grads = [[g.to(DEVICE) for g in make_grads(batch, HALF, 1)]]
    state = (scalar(0.37, FULL, DEVICE), scalar(0, torch.int32, DEVICE))
    first = None
    for _ in range(many(20, 3)):
        again = batch.on(DEVICE)
        plan = mpcore_kernels.plan_update(rule, [again])
        mpcore_kernels.prepare_(plan, Hyper.of(numbers))
        mpcore_kernels.update_(plan, grads, *state, scalar(0, torch.int64, DEVICE))
        first = first or again
        assert_same_batches([again], [first])


@needs_a_gpu
def test_an_update_reaches_tensors_beyond_two_to_the_31_elements_to_the_last():
    size = 2**31 + CHUNK + 1
    if torch.cuda.mem_get_info()[0] < 9 * size:
        pytest.skip("not enough device memory")
    grad = torch.zeros(size, dtype=torch.float32, device=DEVICE)
    grad[[0, 2**31 - 1, 2**31, size - 1]] = 1.0
    param = torch.zeros_like(grad)
    batch = make_batch(0, None, [], steps=None)
    batch.masters, batch.groups = [param], [0]
    plan = mpcore_kernels.plan_update("sgd", [batch])
    mpcore_kernels.prepare_(plan, Hyper.of((1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
    state = (scalar(0.5, FULL, DEVICE), scalar(0, torch.int32, DEVICE))
    mpcore_kernels.update_(plan, [[grad]], *state, scalar(0, torch.int64, DEVICE))
    assert param[[0, 2**31 - 1, 2**31, size - 1]].tolist() == [-0.5] * 4
    assert param.count_nonzero().item() == 4
