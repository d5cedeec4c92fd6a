"""mpcore inside an unmodified `accelerate.Accelerator`.

`mpcore_testing.accelerated` has what stands in for a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.trainer_loops import (
    SCALING,
    Course,
    Overflows,
    adamw,
    clip_in_16_bits,
    masters,
    network,
    own_loop,
    schedule,
    squared_error,
)
from mpcore_testing.trainer_ranks import check_ranks

pytestmark = pytest.mark.trainers
pytest.importorskip("accelerate")

from mpcore_testing import accelerated  # noqa: E402
from mpcore_testing.accelerated import Run, accelerator_of, data_of, reset  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
COURSES = {
    "float16": Course(),
    "overflows": Course(overflows=(0, 3, 4)),
    "overflows, fused": Course(overflows=(0, 3, 4), fused=True),
    "clip": Course(max_norm=0.5, overflows=(2,)),
    "clip, fused": Course(max_norm=0.5, overflows=(2,), fused=True),
    "accumulation": Course(passes=3, max_norm=0.5, overflows=(4,)),
    "bfloat16": Course(dtype=BRAIN),
    "bfloat16, accumulation": Course(dtype=BRAIN, passes=3),
    "bfloat16, clip": Course(dtype=BRAIN, max_norm=0.5),
}


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """Accelerators share state, which outlives them."""
    yield
    reset()


@pytest.mark.parametrize("name", COURSES)
def test_masters_rates_and_skips_are_those_of_our_own_loop(name: str) -> None:
    course = COURSES[name]
    run = Run(course)
    run.train(data_of(course))
    expected = own_loop(
        course,
        network(course.dtype),
        data_of(course),
        squared_error,
        autocast=course.scales,
        clip=None if course.scales else clip_in_16_bits,
    )
    run.outcome().check_same(expected)
    assert sum(expected.skipped) == len(course.overflows)
    assert run.inner.skipped_steps == len(course.overflows)


def test_without_a_scaler_an_overflow_is_skipped_and_the_schedule_moves_on() -> None:
    course = Course(dtype=BRAIN, overflows=(2,))
    run = Run(course)
    run.train(data_of(course))
    assert run.inner.skipped_steps == 1
    assert run.skipped == [False] * course.steps
    assert len(set(run.rates)) == course.steps


@pytest.mark.parametrize("clip_value", [0.01, 1e-3])
def test_clip_by_value_is_that_of_our_own_loop(clip_value: float) -> None:
    course = Course(overflows=(2,))
    run = Run(course)
    run.train(data_of(course), clip_value=clip_value)

    def clip(optimizer: Any, model: nn.Module, limit: float) -> None:
        optimizer.unscale_()
        torch.nn.utils.clip_grad_value_(model.parameters(), limit)

    expected = own_loop(
        replace(course, max_norm=clip_value),
        network(HALF),
        data_of(course),
        squared_error,
        autocast=True,
        clip=clip,
    )
    run.outcome().check_same(expected)


@pytest.mark.parametrize("fused", [False, True])
def test_learning_rates_under_an_overflow_are_those_of_plain_adamw(fused: bool) -> None:
    """float32 AdamW under torch's own scaler, with the same overflows in the same Accelerator."""
    course = Course(overflows=(0, 3, 4), max_norm=0.5, fused=fused)
    run = Run(course)
    run.train(data_of(course))
    reset()
    accelerator = accelerator_of(course, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    net = network()
    Overflows(list(net.parameters())[-1], course.overflows)
    plain = adamw(net.parameters())  # torch's scaler hides the skips of a fused one
    model, optimizer, scheduler = accelerator.prepare(net, plain, schedule(plain))
    rates = []
    for batch in data_of(Course()):
        accelerator.backward(squared_error(model, batch))
        accelerator.clip_grad_norm_(model.parameters(), course.max_norm)
        rates.append(plain.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert run.rates == rates
    assert len(set(rates)) == course.steps - len(course.overflows)


@pytest.mark.parametrize("name", ["clip", "overflows", "bfloat16"])
def test_a_run_that_was_saved_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    whole = Run(course)
    whole.train(data_of(course))
    reset()
    first = Run(course)
    data = data_of(course)
    first.train(data, steps=5)
    first.accelerator.save_state(tmp_path)
    reset()
    second = Run(replace(course, overflows=[n - 5 for n in course.overflows]))
    second.accelerator.load_state(tmp_path)
    second.train(data, steps=3)
    assert first.rates + second.rates == whole.rates
    assert first.skipped + second.skipped == whole.skipped
    for mine, theirs in zip(second.outcome().masters, whole.outcome().masters, strict=True):
        assert torch.equal(mine, theirs)
    if course.scales:
        assert second.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


def test_masters_of_cast_model_survive_prepare() -> None:
    net = network()
    inner = mpcore.MixedPrecisionOptimizer(adamw(net.parameters()), SCALING)
    originals = [p.detach().clone() for p in net.parameters()]
    mpcore.cast_model(net, HALF, inner)
    accelerator_of(Course()).prepare(net, inner)
    assert all(map(torch.equal, masters(net, inner), originals))


def test_several_optimizers_that_are_not_prepared_skip_together() -> None:
    """Accelerate would move the scale after the step of each, and step those that did not skip."""
    course = Course(max_norm=0.5, overflows=(2,))
    results = []
    for accelerated_model in (True, False):
        net = network(HALF)
        Overflows(net[2].bias, course.overflows)
        both = [mpcore.MixedPrecisionOptimizer(adamw(net[i].parameters())) for i in (0, 2)]
        scaler = mpcore.GradScaler.of(SCALING, "cpu")
        accelerator = accelerator_of(course, scaler)
        model = accelerator.prepare(net) if accelerated_model else net
        for batch in data_of(course):
            if accelerated_model:
                accelerator.backward(squared_error(model, batch))
            else:
                with torch.autocast("cpu", dtype=HALF):
                    loss = squared_error(model, batch)
                scaler.scale(loss).backward()
            scaler.clip_grad_norm_(both, course.max_norm)
            for each in both:
                scaler.step(each)
                each.zero_grad()
            scaler.update()
        assert [each.skipped_steps for each in both] == [1, 1]
        results.append([both[i // 2].state[p]["master"] for i, p in enumerate(net.parameters())])
        reset()
    assert all(map(torch.equal, *results))


def test_a_clip_that_accelerate_does_not_unscale_for_is_warned_of() -> None:
    """Without `mixed_precision="fp16"` it never asks a scaler to."""
    run = Run(Course(max_norm=0.5))
    run.accelerator.native_amp = False
    with pytest.warns(UserWarning, match='unscales with mixed_precision="fp16" alone'):
        run.train(data_of(run.course), steps=3)


def test_a_clip_in_bfloat16_rounds_its_norm_and_ours_does_not() -> None:
    """Accelerate unscales for "fp16" alone: where nothing is scaled, it clips what is there."""
    course = Course(dtype=BRAIN, max_norm=0.5, steps=1)
    norms = []
    for clip in ("accelerate", "ours"):
        run = Run(course)
        run.accelerator.backward(squared_error(run.model, next(data_of(course))))
        exact = sum(p.grad.double().square().sum() for p in run.model.parameters()).sqrt()
        if clip == "ours":
            norm = run.optimizer.optimizer.clip_grad_norm_(0.5)
        else:
            norm = run.accelerator.clip_grad_norm_(run.model.parameters(), 0.5)
        norms.append(abs(norm.double() / exact - 1).item())
        reset()
    assert norms[0] < 2**-7, "a few roundings to 8 bits"
    assert norms[1] < 2**-22


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_ranks_skip_together_when_one_overflows_and_train_as_one_process(
    tmp_path: Path,
) -> None:
    expected = accelerated.in_one_process()
    assert sum(expected[0].skipped) == len(accelerated.RANKED.overflows)
    check_ranks(accelerated.__file__, tmp_path, expected)


def test_what_prepare_returns_is_watched_and_its_schedule_waits() -> None:
    reset()
    model = network()
    optimizer: Any = mpcore.MixedPrecisionOptimizer(adamw(model.parameters()), mpcore.NoLossScale())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    accelerator = accelerator_of(Course())
    prepared = accelerator.prepare(optimizer)
    assert prepared is not optimizer
    monitor = mpcore.Monitor(prepared, every=1)
    for factor in (torch.inf, 1.0):
        loss = sum((p.sum() for p in model.parameters()), torch.zeros(())) * factor
        accelerator.backward(loss)
        prepared.step()
        prepared.zero_grad()
        assert mpcore.step_scheduler(scheduler, prepared) is (factor == 1.0)
    assert monitor.course().skipped == (True, False)
    assert None not in monitor.course().loss
