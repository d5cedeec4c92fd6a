"""mpcore inside an unmodified `transformers.Trainer`, and with PEFT's LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mpcore
import mpcore.migration
import pytest
import torch
from torch import nn

from mpcore_testing.trainer_loops import (
    Course,
    Overflows,
    adamw,
    clip_in_16_bits,
    masters,
    own_loop,
)
from mpcore_testing.trainer_ranks import check_ranks

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from mpcore_testing import transformed  # noqa: E402
from mpcore_testing.transformed import Run, batches_of, gpt2, loss_with, norm_of  # noqa: E402

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
COURSES = {
    "float16": Course(),
    "overflows": Course(overflows=(0, 3, 4)),
    "overflows, fused": Course(overflows=(0, 3, 4), fused=True),
    "clip": Course(max_norm=0.5, overflows=(0, 3, 4)),
    "accumulation": Course(passes=2, max_norm=0.5, overflows=(4,)),
    "bfloat16": Course(dtype=BRAIN),
    "bfloat16, accumulation": Course(dtype=BRAIN, passes=2),
    "bfloat16, clip": Course(dtype=BRAIN, max_norm=0.5),
}


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """Accelerators share state, which outlives them."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def expected_of(course: Course, model: Any = None, norms: list[float] | None = None) -> Any:
    """What our own loop comes to; `norms` are filled with those in float64."""

    def clip(optimizer: Any, model: nn.Module, max_norm: float) -> None:
        if course.scales:  # Accelerate clips what is there where nothing is
            optimizer.unscale_()
        if norms is not None:
            norms.append(norm_of(optimizer.grads()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    model = gpt2(course.dtype) if model is None else model
    return own_loop(
        course, model, batches_of(course), loss_with(course), autocast=course.scales, clip=clip
    )


@pytest.mark.parametrize("name", COURSES)
def test_masters_rates_and_skips_are_those_of_our_own_loop(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    run = Run(course, tmp_path)
    run.trainer.train()
    expected = expected_of(course)
    run.outcome().check_same(expected)
    assert sum(expected.skipped) == len(course.overflows) == run.optimizer.skipped_steps


def test_the_logged_norm_is_that_of_the_unscaled_gradients(tmp_path: Path) -> None:
    course = Course(max_norm=0.5)
    run = Run(course, tmp_path)
    run.trainer.train()
    norms: list[float] = []
    expected_of(course, norms=norms)
    assert len(norms) == course.steps
    # float32 sums of squares of 9,000 values, against float64; Trainer logs what torch returns
    assert run.recorded.norms == pytest.approx(norms, rel=1e-5)


def test_learning_rates_under_an_overflow_are_those_of_plain_adamw(tmp_path: Path) -> None:
    """float32 AdamW under torch's own scaler, with the same overflows in the same Trainer."""
    course = Course(overflows=(0, 3, 4), max_norm=0.5, fused=True)
    run = Run(course, tmp_path / "ours")
    run.trainer.train()
    model = gpt2()
    Overflows(list(model.parameters())[-1], course.overflows)
    plain = Run(course, tmp_path / "plain", model, adamw(model.parameters()))
    plain.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain.trainer.train()
    assert run.recorded.rates == plain.recorded.rates
    assert run.recorded.skipped == plain.recorded.skipped
    assert len(set(run.recorded.rates)) == course.steps - len(course.overflows)


@pytest.mark.parametrize("name", ["overflows", "clip", "bfloat16"])
def test_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    whole = Run(course, tmp_path / "whole")
    whole.trainer.train()
    first = Run(course, tmp_path / "cut", stop=5)
    first.trainer.train()
    rest = replace(course, overflows=[n - 5 for n in course.overflows])
    second = Run(rest, tmp_path / "cut", gpt2(course.dtype, seed=7))
    second.trainer.train(resume_from_checkpoint=True)
    assert first.recorded.rates + second.recorded.rates == whole.recorded.rates
    assert first.recorded.skipped + second.recorded.skipped == whole.recorded.skipped
    for mine, theirs in zip(second.outcome().masters, whole.outcome().masters, strict=True):
        assert torch.equal(mine, theirs)
    assert all(map(torch.equal, second.model.parameters(), whole.model.parameters()))


def test_a_saved_model_is_in_16_bits_or_with_one_more_line_in_float32(tmp_path: Path) -> None:
    run = Run(Course(), tmp_path)
    run.trainer.train()
    run.trainer.save_model(str(tmp_path / "half"))
    kind = type(run.model)
    half = kind.from_pretrained(tmp_path / "half")
    assert half.dtype == HALF
    assert all(map(torch.equal, half.parameters(), run.model.parameters()))
    full = mpcore.migration.float32_state_dict(run.model, run.optimizer)
    run.model.save_pretrained(tmp_path / "full", state_dict=full)
    loaded = kind.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert all(map(torch.equal, loaded.parameters(), masters(run.model, run.optimizer)))


@pytest.mark.parametrize(
    ("dtype", "adapters"), [(HALF, HALF), (HALF, FULL), (BRAIN, BRAIN), (BRAIN, FULL)]
)
def test_lora_over_a_16_bit_model(
    dtype: torch.dtype, adapters: torch.dtype, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    course = Course(dtype=dtype, passes=2, max_norm=0.5, overflows=(2,) if dtype == HALF else ())
    run = lora(course, tmp_path, adapters)
    model = run.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {adapters}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    run.trainer.train()
    twin = adapted(adapters, dtype)
    loss_of, data = loss_with(course), batches_of(course)
    expected = own_loop(
        course,
        twin,
        data,
        loss_of,
        autocast=course.scales,
        clip=None if course.scales else clip_in_16_bits,
        optimizer=of_lora(course, twin),
    )
    run.outcome().check_same(expected)
    assert expected.skipped == [step == 1 and dtype == HALF for step in range(course.steps)]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    run.trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(gpt2(dtype), tmp_path / "adapter").state_dict()
    saved = model.state_dict()
    assert all(torch.equal(loaded[n].to(saved[n].dtype), saved[n]) for n in saved)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_ranks_skip_together_when_one_overflows_and_train_as_one_process(
    tmp_path: Path,
) -> None:
    expected = transformed.in_one_process()
    assert sum(expected[0].skipped) == len(transformed.RANKED.overflows)
    check_ranks(transformed.__file__, tmp_path, expected)


def of_lora(course: Course, model: Any) -> Any:
    """The optimizer over the adapters alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    Overflows(trained[-1], course.overflows)
    scaling = transformed.SCALING if course.scales else mpcore.NoLossScale()
    return mpcore.MixedPrecisionOptimizer(adamw(trained), scaling)


def lora(
    course: Course,
    folder: Path,
    adapters: torch.dtype = FULL,
    stop: int | None = None,
    seed: int = 3,
) -> Run:
    """A Trainer that trains adapters alone."""
    model = adapted(adapters, course.dtype, seed)
    return Run(course, folder, model, of_lora(course, model), stop)


def adapted(adapters: torch.dtype, dtype: torch.dtype = HALF, seed: int = 3) -> Any:
    """A GPT-2 with adapters of a dtype: float32 is PEFT's own choice, unless it is told not to."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="gaussian"
    )
    model = gpt2(dtype)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=adapters == torch.float32)


def test_lora_resumes_with_the_same_bits(tmp_path: Path) -> None:
    course = Course(max_norm=0.5, overflows=(2, 6))
    whole = lora(course, tmp_path / "whole")
    whole.trainer.train()
    lora(course, tmp_path / "cut", stop=5).trainer.train()
    second = lora(replace(course, overflows=(1,)), tmp_path / "cut", seed=9)
    second.trainer.train(resume_from_checkpoint=True)
    assert second.recorded.skipped == whole.recorded.skipped[5:]
    assert all(map(torch.equal, second.outcome().masters, whole.outcome().masters))


def test_16_bit_adapters_that_trainer_replaces_when_it_resumes_are_no_silent_standstill(
    tmp_path: Path,
) -> None:
    """Trainer loads adapters as float32, in new parameters that no optimizer made before has."""
    course = Course(max_norm=0.5)
    lora(course, tmp_path, HALF, stop=5).trainer.train()
    second = lora(course, tmp_path, HALF)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        second.trainer.train(resume_from_checkpoint=True)
