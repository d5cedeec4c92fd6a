"""mpcore inside an unmodified `trl.SFTTrainer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpcore_testing.trainer_loops import Course, masters, own_loop, prepared, schedule

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]
trl = pytest.importorskip("trl")
accelerate = pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from mpcore_testing.transformed import (  # noqa: E402
    BATCH,
    LENGTH,
    Recorded,
    arguments,
    gpt2,
    samples,
    use_scaler,
)

COURSES = {
    "float16": Course(),
    "overflows": Course(max_norm=0.5, overflows=(0, 3, 4)),
    "accumulation": Course(passes=2, max_norm=0.5, overflows=(4,)),
    "bfloat16": Course(dtype=torch.bfloat16),
}


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """Accelerators share state, which outlives them."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def tokenizer() -> Any:
    """A vocabulary of 29 words, of which the first one pads."""
    words = {f"w{i}": i for i in range(29)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="w0", eos_token="w0", unk_token="w0"
    )


def build(course: Course, folder: Path, stop: int | None = None) -> tuple[Any, Any, Any]:
    """A trainer, its optimizer, and what saw its steps."""
    rows = samples(course.steps * course.passes * BATCH)
    data = datasets.Dataset.from_list([{"input_ids": r["input_ids"].tolist()} for r in rows])
    model = gpt2(course.dtype)
    optimizer = prepared(course, model)
    recorded = Recorded()
    recorded.trainer = trainer = trl.SFTTrainer(
        model=model,
        args=arguments(course, folder, stop, kind=trl.SFTConfig),
        train_dataset=data,
        processing_class=tokenizer(),
        optimizers=(optimizer, schedule(optimizer)),
        callbacks=[recorded],
    )
    use_scaler(trainer, course)
    return trainer, optimizer, recorded


@pytest.mark.parametrize("name", COURSES)
def test_masters_rates_and_skips_are_those_of_our_own_loop(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    trainer, optimizer, recorded = build(course, tmp_path)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    twin, of_twin, _ = build(course, tmp_path)
    twin.model.train()
    labels = torch.tensor(course.passes * BATCH * LENGTH)  # of all passes, as Trainer counts them

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        """The trainer's own, which patches its model for it."""
        loss: torch.Tensor = twin.compute_loss(model, batch, num_items_in_batch=labels)
        return loss.float() * course.passes

    expected = own_loop(
        course, twin.model, iter(batches), loss_of, autocast=course.scales, optimizer=of_twin
    )
    assert recorded.skipped == expected.skipped
    assert recorded.rates == expected.rates
    assert all(map(torch.equal, masters(trainer.model, optimizer), expected.masters))
    assert sum(expected.skipped) == len(course.overflows)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    course = Course(max_norm=0.5, overflows=(0, 3, 6))
    whole, of_whole, _ = build(course, tmp_path / "whole")
    whole.train()
    build(course, tmp_path / "cut", stop=5)[0].train()
    second, of_second, recorded = build(replace(course, overflows=(1,)), tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    assert recorded.skipped == [False, True, False]
    results = [masters(whole.model, of_whole), masters(second.model, of_second)]
    assert all(map(torch.equal, *results))
