"""Trainers on several ranks, and the same training in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mpcore
import torch
from torch import Tensor, distributed, nn

from mpcore_testing.ranks import run_ranks
from mpcore_testing.trainer_loops import Course, Outcome, masters, prepared, schedule

RANKS = 2


@contextmanager
def one_of_ranks(rank: int, folder: str) -> Iterator[Callable[[Outcome, float], None]]:
    """Within it this process is a rank, as torchrun makes them; yields what saves its outcome."""
    size = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in size.items()})
    distributed.init_process_group("gloo", f"file://{folder}/s", rank=rank, world_size=RANKS)

    def save(outcome: Outcome, scale: float) -> None:
        torch.save({**vars(outcome), "scale": scale}, f"{folder}/rank{rank}.pt")

    yield save
    distributed.barrier()
    distributed.destroy_process_group()


def check_ranks(file: str | None, folder: Path, expected: tuple[Outcome, float]) -> None:
    """Runs `work` of a module on all ranks; fails unless each comes to what is expected."""
    assert file is not None
    run_ranks(file, folder, count=RANKS)
    for rank in range(RANKS):
        found = torch.load(folder / f"rank{rank}.pt")
        assert found.pop("scale") == expected[1]
        Outcome(**found).check_same(expected[0])


def averaged_loop(
    course: Course,
    model: nn.Module,
    data: list[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    scheduled: int = 1,
    autocast: bool = True,
) -> tuple[Outcome, float]:
    """Trains on the batches of all ranks, whose gradients are averaged as these average them.

    Args:
        course: Its overflows are steps.
        model: Trained.
        data: Batches of each rank.
        loss_of: Of a model on a batch.
        scheduled: How often the schedule moves in a step.
        autocast: Whether the forward pass runs under autocast.
    """
    params = list(model.parameters())
    optimizer = prepared(Course(), model)
    scheduler = schedule(optimizer)
    rates, skipped = [], []
    for step in range(course.steps):
        grads: list[list[Tensor]] = []
        for batches in data:
            with torch.autocast("cpu", dtype=course.dtype, enabled=autocast):
                loss = loss_of(model, next(batches))
            found = torch.autograd.grad(loss * optimizer.loss_scale, params)
            grads.append([grad / RANKS for grad in found])
        optimizer.scale(loss.detach())
        for param, one, other in zip(params, *grads, strict=True):
            param.grad = one + other
        if step in course.overflows:
            params[-1].grad.fill_(torch.inf)
        optimizer.unscale_()
        torch.nn.utils.clip_grad_norm_(params, course.max_norm)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.last_step.skipped)
        for _ in range(scheduled):
            mpcore.step_scheduler(scheduler, optimizer.last_step)
    return Outcome(masters(model, optimizer), rates, skipped), optimizer.loss_scale
