"""Training under `lightning.pytorch.Trainer` and `lightning.fabric.Fabric`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mpcore
import torch
from lightning import LightningModule, Trainer
from mpcore.integrations.lightning import MasterWeightsPrecision
from torch import Tensor

from mpcore_testing.trainer_loops import (
    Course,
    Outcome,
    batches,
    masters,
    network,
    prepared,
    schedule,
    squared_error,
)
from mpcore_testing.trainer_ranks import RANKS, averaged_loop, one_of_ranks


class Module(LightningModule):  # type: ignore[misc]
    """What people write; the schedule waits where `waits`, and moves in each step otherwise."""

    def __init__(self, course: Course, waits: bool = True, nones: Iterable[int] = ()) -> None:
        super().__init__()
        self.course, self.waits, self.nones = course, waits, set(nones)
        self.net = network(course.dtype)
        self.rates: list[float] = []
        self.skipped: list[bool] = []
        self.seen: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        """Ours, and a schedule that moves in each step."""
        self.optimizer = prepared(self.course, self.net)
        each_step = {"scheduler": schedule(self.optimizer), "interval": "step"}
        return {"optimizer": self.optimizer, "lr_scheduler": each_step}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss, or None for a batch to be left out."""
        return None if batch_idx in self.nones else squared_error(self.net, batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Notes the learning rate, and a gradient as hooks see it."""
        self.rates.append(optimizer.param_groups[0]["lr"])
        grad = next(self.net.parameters()).grad
        if grad is not None:
            self.seen.append(grad.clone())

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The override that the documentation names."""
        self.skipped.append(self.optimizer.last_step is None or self.optimizer.last_step.skipped)
        if self.waits:
            mpcore.step_scheduler(scheduler, self.optimizer.last_step)
        else:
            super().lr_scheduler_step(scheduler, metric)

    def outcome(self) -> Outcome:
        """What the training has come to."""
        return Outcome(masters(self.net, self.optimizer), self.rates, self.skipped)


class Data(torch.utils.data.Dataset[Any]):
    """Batches in a row."""

    def __init__(self, course: Course, seed: int = 1) -> None:
        self.rows = list(batches(course.steps * course.passes, course.dtype, seed))

    def __len__(self) -> int:
        """How many."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """One batch."""
        return self.rows[index]


def loader(data: Data) -> Any:
    """Hands out batches as they are."""
    return torch.utils.data.DataLoader(data, batch_size=None)


def trainer_of(course: Course, folder: Path, **options: Any) -> Any:
    """A Trainer with our plugin, and nothing that writes."""
    plugins = options.pop("plugins", None) or MasterWeightsPrecision()
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=plugins,
        accumulate_grad_batches=course.passes,
        gradient_clip_val=course.max_norm,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "enable_checkpointing": False, **options},
    )


RANKED = Course(max_norm=0.5, overflows=(0, 3, 4))


def work(rank: str | int, folder: str) -> None:
    """Trains with DistributedDataParallel; the last rank alone overflows."""
    with one_of_ranks(int(rank), folder) as save:
        overflows = RANKED.overflows if int(rank) == RANKS - 1 else ()
        module = Module(Course(max_norm=RANKED.max_norm, overflows=overflows))
        trainer = trainer_of(
            RANKED, Path(folder), strategy="ddp", devices=RANKS, use_distributed_sampler=False
        )
        trainer.fit(module, loader(Data(RANKED, seed=1 + int(rank))))
        assert trainer.world_size == RANKS
        save(module.outcome(), module.optimizer.loss_scale)


def in_one_process() -> tuple[Outcome, float]:
    """The same training in one process."""
    data = [iter(Data(RANKED, seed=1 + rank).rows) for rank in range(RANKS)]
    return averaged_loop(RANKED, network(RANKED.dtype), data, squared_error, autocast=False)
