"""Training under `accelerate.Accelerator`, in one process or several.

On a CPU an Accelerator makes no scaler. `accelerator_of` gives it ours before `prepare`, which is
the line that the documentation names, and sets what `mixed_precision="fp16"` sets on a GPU.
"""

from __future__ import annotations

from typing import Any

import accelerate
import mpcore

from mpcore_testing.trainer_loops import (
    SCALING,
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

RANKED = Course(max_norm=0.5, overflows=(0, 3, 4))


def accelerator_of(course: Course, scaler: Any = None) -> Any:
    """An Accelerator as on a GPU: with `mixed_precision="fp16"` where losses are scaled."""
    accelerator = accelerate.Accelerator(
        cpu=True,
        mixed_precision="fp16" if course.scales else "no",
        gradient_accumulation_steps=course.passes,
    )
    if course.scales:
        accelerator.native_amp = True
        accelerator.scaler = scaler or mpcore.GradScaler.of(SCALING, "cpu")
    return accelerator


class Run:
    """The loop of Accelerate's documentation."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.accelerator = accelerator_of(course)
        net = network(course.dtype)
        self.inner = prepared(course, net)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            net, self.inner, schedule(self.inner)
        )
        self.rates: list[float] = []
        self.skipped: list[bool] = []

    def train(self, data: Any, steps: int | None = None, clip_value: float | None = None) -> None:
        for _ in range((self.course.steps if steps is None else steps) * self.course.passes):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(squared_error(self.model, next(data)))
                if self.accelerator.sync_gradients:
                    if self.course.max_norm is not None:
                        self.accelerator.clip_grad_norm_(
                            self.model.parameters(), self.course.max_norm
                        )
                    if clip_value is not None:
                        self.accelerator.clip_grad_value_(self.model.parameters(), clip_value)
                    self.rates.append(self.optimizer.param_groups[0]["lr"])
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    self.skipped.append(self.accelerator.optimizer_step_was_skipped)
                self.scheduler.step()
                self.optimizer.zero_grad()

    def outcome(self) -> Outcome:
        return Outcome(masters(self.model, self.inner), self.rates, self.skipped)


def data_of(course: Course, seed: int = 1) -> Any:
    return batches(course.steps * course.passes, course.dtype, seed)


def reset() -> None:
    """Forgets what Accelerators of one process share."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def work(rank: str | int, folder: str) -> None:
    """Trains with DistributedDataParallel; the last rank alone overflows."""
    with one_of_ranks(int(rank), folder) as save:
        overflows = RANKED.overflows if int(rank) == RANKS - 1 else ()
        run = Run(Course(max_norm=RANKED.max_norm, overflows=overflows))
        assert run.accelerator.num_processes == RANKS
        assert type(run.model).__name__ == "DistributedDataParallel"
        run.train(data_of(RANKED, seed=1 + int(rank)))
        save(run.outcome(), run.accelerator.scaler.get_scale())


def in_one_process() -> tuple[Outcome, float]:
    """The same training in one process."""
    data = [data_of(RANKED, seed=1 + rank) for rank in range(RANKS)]
    # Accelerate's schedules count the batches of all ranks
    return averaged_loop(RANKED, network(RANKED.dtype), data, squared_error, scheduled=RANKS)
