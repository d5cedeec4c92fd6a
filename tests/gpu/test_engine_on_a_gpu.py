"""The whole engine on the device: the reference's bits, no waiting, and a step in a CUDA graph."""

import mpcore
import pytest
import torch

from mpcore_testing.engine_runs import OPTIMIZERS, OVERFLOWS, Training
from mpcore_testing.gpu import DEVICE, captured, no_sync, rehearsed
from mpcore_testing.kernels import assert_same_bits
from mpcore_testing.marks import needs_a_gpu

pytestmark = pytest.mark.gpu


def runs(name, dtype=torch.float16):
    """The kernels on the device, and the reference backend on the CPU."""
    places = {"triton": DEVICE, "reference": torch.device("cpu")}
    return [
        Training(OPTIMIZERS[name], dtype, backend, float32=True, device=device)
        for backend, device in places.items()
    ]


def assert_alike(ours, theirs):
    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_same_bits(actual.cpu(), expected)
    one, other = ours.optimizer, theirs.optimizer
    assert (one.loss_scale, one.steps, one.skipped_steps) == (
        other.loss_scale,
        other.steps,
        other.skipped_steps,
    )


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", rehearsed([torch.float16, torch.bfloat16], 1), ids=str)
@pytest.mark.parametrize("name", rehearsed(OPTIMIZERS, 2))
def test_training_has_the_bits_of_the_reference_on_the_cpu(name, dtype, max_norm):
    ours, theirs = runs(name, dtype)
    for number in range(6):
        for run in (ours, theirs):
            run.load(number)
            run.step(max_norm)
        assert_alike(ours, theirs)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_step_never_waits_for_the_device(max_norm):
    ours, _ = runs("AdamW")
    for number in range(4):
        ours.load(number, in_place=number > 0)
        if number == 0:
            ours.step(max_norm)
            continue
        with no_sync():
            ours.step(max_norm)
    assert ours.optimizer.steps == 4


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", rehearsed(OPTIMIZERS, 2))
def test_a_captured_step_is_replayed_across_overflows(name, max_norm):
    ours, theirs = runs(name)
    lr = torch.tensor(0.01, device=DEVICE)
    for group in ours.optimizer.param_groups:
        group["lr"] = lr
    for run in (ours, theirs):  # makes masters and moments, at addresses that stay
        run.load(0)
        run.step(max_norm)
    scale = ours.optimizer._scale
    state = [*ours.tensors(), scale.scale, scale.growth_tracker, scale.overflows_left]
    ours.load(1, in_place=True)
    replay = captured(lambda: take(ours, max_norm), [*state, scale.counters])
    for number in range(1, 7):
        lr.fill_(0.01 / number)
        for group in theirs.optimizer.param_groups:
            group["lr"] = lr.item()
        ours.load(number, in_place=True)
        theirs.load(number)
        replay()
        theirs.step(max_norm)
        assert_alike(ours, theirs)
    assert ours.optimizer.skipped_steps == len(OVERFLOWS)


def take(run, max_norm):
    """A step by itself: its loss is scaled within the capture."""
    run.optimizer.scale(run.loss)
    run.step(max_norm)


@needs_a_gpu
def test_a_hundred_skips_in_a_row_are_reported_though_nobody_waits():
    weight = torch.nn.Parameter(torch.zeros(3, device=DEVICE).half())
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD([weight], lr=0.1))

    def skip():
        for _ in range(300):
            optimizer.scale(torch.ones((), device=DEVICE))
            weight.grad = torch.full_like(weight, torch.inf)
            optimizer.step()
            torch.cuda.synchronize()

    with pytest.warns(UserWarning, match="steps was skipped"):
        skip()
