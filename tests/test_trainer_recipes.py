"""The recipes of docs/trainers.md for ignite and fastai: the bits of our own loop."""

from __future__ import annotations

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing.trainer_loops import (
    SCALING,
    Course,
    batches,
    masters,
    network,
    own_loop,
    prepared,
    schedule,
    squared_error,
)

pytestmark = pytest.mark.trainers
HALF = torch.float16


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output.float(), target)


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")
@pytest.mark.parametrize("passes", [1, 2])
def test_ignite(passes: int) -> None:
    ignite = pytest.importorskip("ignite.engine")
    course = Course(passes=passes, overflows=(0, 3, 4))
    net = network(HALF)
    optimizer = prepared(course, net)
    scheduler = schedule(optimizer)
    scaler = mpcore.GradScaler.of(SCALING, "cpu")
    trainer = ignite.create_supervised_trainer(
        net,
        optimizer,
        loss_of,
        device="cpu",
        amp_mode="amp",
        scaler=scaler,
        gradient_accumulation_steps=passes,
    )

    @trainer.on(ignite.Events.ITERATION_COMPLETED(every=passes))
    def _() -> None:
        mpcore.step_scheduler(scheduler, optimizer.last_step)

    data = list(batches(course.steps * passes, HALF))
    trainer.run(data, max_epochs=1)
    expected = own_loop(course, network(HALF), iter(data), squared_error)
    assert all(map(torch.equal, masters(net, optimizer), expected.masters))
    assert optimizer.skipped_steps == sum(expected.skipped)
    assert (sum(expected.skipped) > 0) == (scaler.skipped_steps > 0)


# fastai asks for torchvision, which may not fit a CPU build of torch: no extra of ours installs it
@pytest.mark.parametrize("clips", [False, True])
def test_fastai(clips: bool) -> None:
    fastai = pytest.importorskip("fastai.callback.training")
    learner = pytest.importorskip("fastai.learner")
    wrapper = pytest.importorskip("fastai.optimizer")

    class MasterWeights(learner.Callback):
        order = 0  # before GradientClip

        def before_backward(self) -> None:
            self.learn.loss_grad = self.opt.opt.scale(self.loss_grad)

        def after_backward(self) -> None:
            self.opt.opt.unscale_()

    course = Course(max_norm=0.5, overflows=(0, 3, 4))
    data = list(batches(course.steps, HALF))
    net = network(HALF)
    made = prepared(course, net)
    loaders = learner.DataLoaders(data, data)
    callbacks = [MasterWeights(), *([fastai.GradientClip(0.5)] if clips else [])]
    trainer = learner.Learner(
        loaders,
        net,
        loss_func=loss_of,
        opt_func=lambda params, **_: wrapper.OptimWrapper(opt=made),
        cbs=callbacks,
        lr=3e-3,
        wd=0.1,
        train_bn=False,
    )
    with trainer.no_bar(), trainer.no_logging():
        trainer.fit(1)
    expected = own_loop(
        Course(max_norm=0.5 if clips else None, overflows=(0, 3, 4)),
        network(HALF),
        iter(data),
        squared_error,
        schedules=False,
    )
    assert all(map(torch.equal, masters(net, made), expected.masters))
    assert made.skipped_steps == len(course.overflows)
