"""Loss scaling against losses that are small, on the digits, with SGD and momentum.

A loss weight w stands for that of an auxiliary loss, or for a mean over very many samples. The
learning rate is divided by it, so that in exact arithmetic it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mpcore.base import Table
from mpcore.comparison.result import mean_and_spread
from mpcore.demo.digits import DigitsSettings, Images, SideBySideMLP, summed_loss
from mpcore.demo.tables import small
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.loss_scale import DynamicLossScale, LossScale, NoLossScale, StaticLossScale
from mpcore.precision import cast_model, emulate_tensor_cores

WEIGHTS = (1.0, 1e-4, 1e-5, 3e-6, 1e-6)
LEARNING_RATE, MOMENTUM = 0.05, 0.9
SETTINGS = DigitsSettings(seeds=(0, 1, 2, 3, 4), epochs=15, batch=64)
#: Names, formats and scales, in the order of the columns.
WAYS: tuple[tuple[str, torch.dtype, LossScale], ...] = (
    ("FP32", torch.float32, NoLossScale()),
    ("FP16, 1", torch.float16, StaticLossScale(1.0)),
    ("FP16, 8", torch.float16, StaticLossScale(8.0)),
    ("FP16, 128", torch.float16, StaticLossScale(128.0)),
    ("FP16, 2^15", torch.float16, StaticLossScale(2.0**15)),
    ("FP16, dynamic", torch.float16, DynamicLossScale()),
    ("BF16, 1", torch.bfloat16, NoLossScale()),
)


@dataclass(frozen=True)
class ScalingRun:
    """What one way did with one loss weight.

    Attributes:
        accuracies: On the test images, one for each seed.
        skipped: Steps.
    """

    accuracies: tuple[float, ...]
    skipped: int


def train(
    dtype: torch.dtype,
    scale: LossScale,
    weight: float,
    settings: DigitsSettings,
    on_epoch: Callable[[int], None],
) -> ScalingRun:
    """Trains all seeds side by side; a dynamic scale is shared between them.

    Args:
        dtype: Of the weights; 16-bit ones have FP32 masters.
        scale: Of the loss.
        weight: Multiplies the loss; the learning rate is divided by it.
        settings: Seeds, epochs, batch and layers.
        on_epoch: Hears how many epochs are done.

    Example:
        >>> settings = DigitsSettings(epochs=1, seeds=(0,))
        >>> run = train(torch.float16, StaticLossScale(1.0), 1e-6, settings, lambda done: None)
        >>> run.accuracies[0] < 0.2  # every gradient became 0
        True
    """
    images = Images.load()
    model: nn.Module = SideBySideMLP((64, *settings.hidden, 10), settings.seeds)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE / weight, momentum=MOMENTUM)
    optimizer = MixedPrecisionOptimizer(sgd, scale)
    if dtype != torch.float32:
        model = cast_model(model, dtype, optimizer)
    for done, batches in enumerate(images.epochs(settings), start=1):
        for inputs, labels in batches:
            with emulate_tensor_cores():
                optimizer.backward(summed_loss(model(inputs), labels) * weight)
            optimizer.step()
            optimizer.zero_grad()
        on_epoch(done)
    logits = images.test_logits(model, len(settings.seeds))
    return ScalingRun(images.accuracies(logits), optimizer.skipped_steps)


def measure(
    settings: DigitsSettings, on_run: Callable[[str, int], Callable[[int], None]]
) -> dict[float, dict[str, ScalingRun]]:
    """Trains every way with every loss weight.

    Args:
        settings: Seeds and epochs.
        on_run: Hears the name of a run and its epochs; returns what hears of each epoch.

    Returns:
        By loss weight, the runs by name.
    """
    return {
        weight: {
            name: train(
                dtype,
                scale,
                weight,
                settings,
                on_run(f"loss x {small(weight)}: {name}", settings.epochs),
            )
            for name, dtype, scale in WAYS
        }
        for weight in WEIGHTS
    }


def table(found: dict[float, dict[str, ScalingRun]], settings: DigitsSettings) -> Table:
    """Returns test accuracies, one row for each loss weight."""
    rows = tuple(
        (
            small(weight),
            *(mean_and_spread([100 * value for value in run.accuracies]) for run in runs.values()),
        )
        for weight, runs in found.items()
    )
    skipped = sum(run.skipped for runs in found.values() for run in runs.values())
    return Table(
        title="Loss scaling rescues small losses: test accuracy in %",
        header=("Loss x", *(name for name, _, _ in WAYS)),
        rows=rows,
        notes=(
            f"A 64-128-64-10 ReLU network with FP32 masters, SGD with momentum {MOMENTUM:g} at a "
            f"learning rate of {LEARNING_RATE:g} over the loss weight, {settings.epochs} epochs of "
            f"{settings.batch} images a step, {len(settings.seeds)} seeds: mean and standard "
            f"deviation. The numbers behind the formats are loss scales. Skipped: {skipped} steps.",
        ),
    )
