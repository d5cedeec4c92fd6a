"""A `Monitor` over what trainers hand out tells what it tells of our own loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from mpcore.engine import unwrapped

from mpcore_testing.trainer_loops import (
    Course,
    batches,
    network,
    own_loop,
    prepared,
    schedule,
    squared_error,
)

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The model passed to `Fabric.no_backward_sync"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
lightning = pytest.importorskip("lightning")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from lightning.fabric import Fabric  # noqa: E402
from mpcore.integrations.lightning import FabricMasterWeightsPrecision  # noqa: E402

from mpcore_testing.lightened import Data, Module, loader, trainer_of  # noqa: E402
from mpcore_testing.transformed import Run, batches_of, gpt2, loss_with  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
COURSES = {
    "float16": Course(overflows=(0, 3, 4)),
    "clip": Course(max_norm=0.5, overflows=(0, 3, 4)),
    "accumulation": Course(passes=2, max_norm=0.5, overflows=(4,)),
    "bfloat16": Course(dtype=BRAIN),
}


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """Accelerators share state, which outlives them."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def check_told(monitor: Any, expected: Any) -> None:
    """Fails unless a monitor was told what another was: loss, norm, scale and skip of each step."""
    mine, theirs = monitor.course(), expected.course()
    assert mine.skipped == theirs.skipped
    assert any(mine.skipped) == (mine.loss_scale[0] != 1.0)
    assert mine.loss_scale == theirs.loss_scale
    assert None not in mine.loss
    # sums of passes in float32, which trainers divide in another order
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-6, nan_ok=True)
    # a clip of unscaled gradients is looked at by torch, or by us
    assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5, nan_ok=True)
    assert (monitor.report() is None) == (expected.report() is None)


def watched_loop(course: Course, model: Any, data: Any, loss_of: Any, **options: Any) -> Any:
    """The monitor of our own loop."""
    optimizer = prepared(course, model)
    monitor = mpcore.Monitor(optimizer, model, every=1)
    own_loop(course, model, data, loss_of, optimizer=optimizer, **options)
    return monitor


class Watched(Module):
    """Watches what Lightning hands out."""

    def on_train_start(self) -> None:
        """Lightning's object is of the class of the optimizer, and is not it."""
        given = self.optimizers()
        assert given is not self.optimizer
        assert unwrapped(given) is self.optimizer
        self.monitor = mpcore.Monitor(given, self.net, every=1)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """With Lightning's object instead of the optimizer."""
        mpcore.step_scheduler(scheduler, self.optimizers())


class Manual(Watched):
    """A loop of its own."""

    def __init__(self, course: Course) -> None:
        super().__init__(course)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning does not say which optimizer a loss is for."""
        optimizer: Any = self.optimizers()
        self.manual_backward(optimizer.scale(squared_error(self.net, batch) / self.course.passes))
        if (batch_idx + 1) % self.course.passes:
            return
        if self.course.max_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.course.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        mpcore.step_scheduler(self.lr_schedulers(), optimizer)


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("kind", [Watched, Manual])
def test_lightning(kind: Any, name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    module = kind(course)
    of_trainer = course if kind is Watched else replace(course, passes=1, max_norm=None)
    trainer_of(of_trainer, tmp_path).fit(module, loader(Data(course)))
    data = iter(Data(course).rows)
    check_told(module.monitor, watched_loop(course, network(course.dtype), data, squared_error))


@pytest.mark.parametrize("name", COURSES)
def test_fabric(name: str) -> None:
    course = COURSES[name]
    fabric = Fabric(accelerator="cpu", devices=1, plugins=FabricMasterWeightsPrecision())
    net = network(course.dtype)
    inner = prepared(course, net)
    scheduler = schedule(inner)
    model, optimizer = fabric.setup(net, inner)
    assert unwrapped(optimizer) is inner
    monitor = mpcore.Monitor(optimizer, net, every=1)
    data = batches(course.steps * course.passes, course.dtype)
    for _ in range(course.steps):
        for _ in range(course.passes):
            loss = squared_error(model, next(data)) / course.passes
            fabric.backward(optimizer.scale(loss))
        if course.max_norm is not None:
            options: Any = {"max_norm": course.max_norm, "error_if_nonfinite": False}
            fabric.clip_gradients(model, optimizer, **options)
        optimizer.step()
        optimizer.zero_grad()
        mpcore.step_scheduler(scheduler, optimizer)
    data = batches(course.steps * course.passes, course.dtype)
    check_told(monitor, watched_loop(course, network(course.dtype), data, squared_error))


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """What the documentation has."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Watches what Accelerate has made of the optimizer."""
        self.monitor = mpcore.Monitor(optimizer, model, every=1)


@pytest.mark.parametrize("name", [name for name in COURSES if name != "bfloat16"])
def test_transformers_trainer(name: str, tmp_path: Path) -> None:
    course = COURSES[name]
    run, watch = Run(course, tmp_path), Watch()
    run.trainer.add_callback(watch)
    run.trainer.train()
    expected = watched_loop(
        course, gpt2(course.dtype), batches_of(course), loss_with(course), autocast=course.scales
    )
    check_told(watch.monitor, expected)
