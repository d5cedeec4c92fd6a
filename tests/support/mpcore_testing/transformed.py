"""Training under `transformers.Trainer` with a tiny GPT-2 that a configuration makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mpcore
import torch
import transformers
from torch import Tensor, nn

from mpcore_testing.trainer_loops import SCALING, Course, Outcome, masters, prepared, schedule
from mpcore_testing.trainer_ranks import RANKS, averaged_loop, one_of_ranks

BATCH, LENGTH = 4, 12


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Two layers of width 16; no dropout, so that nothing depends on how often a die is cast."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=29,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype)


def samples(count: int) -> list[dict[str, Tensor]]:
    """Sequences of tokens."""
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(29, (LENGTH,), generator=draw) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in tokens]


def batches_of(course: Course) -> Any:
    """What Trainer makes of `samples` for a course, in order."""
    rows = samples(course.steps * course.passes * BATCH)
    for i in range(0, len(rows), BATCH):
        some = rows[i : i + BATCH]
        yield {key: torch.stack([row[key] for row in some]) for key in some[0]}


def loss_with(course: Course) -> Any:
    """The loss as Trainer asks for it: a sum, divided by the labels of all passes of a step.

    It is multiplied by the number of passes (a power of two), by which `own_loop` divides.
    """
    tokens = torch.tensor(course.passes * BATCH * LENGTH)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch, num_items_in_batch=tokens).loss
        return loss.float() * course.passes

    return loss_of


class Recorded(transformers.TrainerCallback):  # type: ignore[misc]
    """Learning rates and skips of each step, as Trainer's own callbacks see them."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.skipped: list[bool] = []
        self.norms: list[float] = []
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


class Run:
    """A Trainer with our optimizer and, where losses are scaled, our scaler.

    Args:
        course: What is done.
        folder: For checkpoints, one after five steps if there are more.
        model: Trained; None: a tiny GPT-2.
        optimizer: Ours; None: as every course has it.
        stop: Steps after which it stops; None: those of the course.
        rows: Of data; None: as many as the course takes.
    """

    def __init__(
        self,
        course: Course,
        folder: Path,
        model: Any = None,
        optimizer: Any = None,
        stop: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.course = course
        self.model = gpt2(course.dtype) if model is None else model
        self.optimizer = prepared(course, self.model) if optimizer is None else optimizer
        self.recorded = Recorded()
        self.trainer = transformers.Trainer(
            model=self.model,
            args=arguments(course, folder, stop),
            train_dataset=samples(rows or course.steps * course.passes * BATCH),
            optimizers=(self.optimizer, schedule(self.optimizer)),
            callbacks=[self.recorded],
        )
        self.recorded.trainer = self.trainer
        use_scaler(self.trainer, course)

    def outcome(self) -> Outcome:
        """What the training has come to."""
        found = masters(self.model, self.optimizer)
        return Outcome(found, self.recorded.rates, self.recorded.skipped)


def arguments(course: Course, folder: Path, stop: int | None = None, kind: Any = None) -> Any:
    """The arguments of a Trainer; `kind` is their class."""
    return (kind or transformers.TrainingArguments)(
        output_dir=str(folder),
        max_steps=course.steps if stop is None else stop,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=course.passes,
        max_grad_norm=0.0 if course.max_norm is None else course.max_norm,
        train_sampling_strategy="sequential",
        fp16=course.scales,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        disable_tqdm=True,
    )


def use_scaler(trainer: Any, course: Course) -> None:
    """The line that the documentation names; the other one does what `fp16=True` does on a GPU."""
    if course.scales:
        trainer.accelerator.scaler = mpcore.GradScaler.of(SCALING, "cpu")
        trainer.accelerator.native_amp = True


def norm_of(grads: list[Tensor]) -> float:
    """The 2-norm in float64."""
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


RANKED = Course(max_norm=0.5, overflows=(0, 3, 4))


def work(rank: str | int, folder: str) -> None:
    """Trains with DistributedDataParallel; the last rank alone overflows."""
    with one_of_ranks(int(rank), folder) as save:
        overflows = RANKED.overflows if int(rank) == RANKS - 1 else ()
        course = Course(max_norm=RANKED.max_norm, overflows=overflows)
        run = Run(course, Path(folder), rows=RANKS * RANKED.steps * BATCH)
        assert run.trainer.accelerator.num_processes == RANKS
        run.trainer.train()
        save(run.outcome(), run.trainer.accelerator.scaler.get_scale())


def in_one_process() -> tuple[Outcome, float]:
    """The same training in one process: ranks take batches in turn."""
    batches = list(batches_of(Course(steps=RANKS * RANKED.steps)))
    data = [iter(batches[rank::RANKS]) for rank in range(RANKS)]
    # Trainer divides by the labels of all ranks, and multiplies by how many average
    loss_of = loss_with(Course(passes=RANKS))
    return averaged_loop(RANKED, gpt2(RANKED.dtype), data, loss_of)
