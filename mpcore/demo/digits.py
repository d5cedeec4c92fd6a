"""A second, quick experiment: handwritten digits at a small learning rate.

A short GPT run barely needs FP32 masters in FP16: Adam moves a weight by about the learning rate,
and FP16 keeps a change above 2^-11 of the weight. Where the learning rate is smaller than that, the
update disappears (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1).

Data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998; the 1,797 test images, as shipped with scikit-learn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from mpcore.demo.measure import UpdateTally
from mpcore.demo.regimes import AdamWSettings, Regime, prepare
from mpcore.loss_scale import DynamicLossScale, LossScale
from mpcore.precision import emulate_tensor_cores


@dataclass(frozen=True)
class DigitsSettings:
    """Everything that the digits runs have in common.

    Attributes:
        seeds: One model per seed; all are trained side by side in one batched network.
        epochs: Passes over the training images.
        batch: Images in a batch.
        hidden: Units in the two hidden layers.
        adamw: Plain Adam at a learning rate of 3e-5.
        scale: The loss scale of the regimes that have one.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 30
    batch: int = 32
    hidden: tuple[int, int] = (128, 64)
    adamw: AdamWSettings = field(
        default_factory=lambda: AdamWSettings(3e-5, (0.9, 0.999), eps=1e-8, weight_decay=0.0)
    )
    scale: LossScale = field(default_factory=DynamicLossScale)


@dataclass(frozen=True)
class DigitsRun:
    """What one regime did: test accuracy per seed, updates lost, steps skipped, seconds."""

    regime: Regime
    accuracies: tuple[float, ...]
    lost_updates: float
    skipped_steps: int
    seconds: float


class SideBySideMLP(nn.Module):
    """Independent ReLU networks of one shape, one per seed, computed by batched products.

    Example:
        >>> model = SideBySideMLP((64, 16, 10), seeds=(0, 1, 2))
        >>> model(torch.zeros(3, 5, 64)).shape  # seed, image, class
        torch.Size([3, 5, 10])
    """

    def __init__(self, sizes: tuple[int, ...], seeds: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for fan_in, fan_out in pairwise(sizes):
            # He et al., "Delving Deep into Rectifiers", 2015: keeps the variance through ReLUs
            std = math.sqrt(2 / fan_in)
            draws = [torch.randn(fan_in, fan_out, generator=g) * std for g in generators]
            self.weights.append(nn.Parameter(torch.stack(draws)))
            self.biases.append(nn.Parameter(torch.zeros(len(seeds), 1, fan_out)))

    def forward(self, images: Tensor) -> Tensor:
        """Maps `[seeds, batch, pixels]` to logits `[seeds, batch, classes]`."""
        return self.layers(images)[-1]

    def layers(self, images: Tensor) -> list[Tensor]:
        """Returns what each layer makes of images, before and after its ReLU; the logits last."""
        outputs = [images.to(self.weights[0].dtype)]
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            outputs.append(torch.baddbmm(bias, outputs[-1], weight))
            if index < len(self.weights) - 1:
                outputs.append(outputs[-1].relu())
        return outputs[1:]


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loads the images: every fifth one is for testing, the others are for training; no sync.

    Returns:
        Training images `[n, 64]` float32 in [0, 1] and labels `[n]` int64, then the same to test.

    Example:
        >>> images, labels, test_images, test_labels = load_split()
        >>> len(images), len(test_images)
        (1437, 360)
    """
    data = load_digits()
    images = torch.from_numpy(data.data).float() / 16
    labels = torch.from_numpy(data.target).long()
    held_out = torch.arange(len(images)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


@dataclass(frozen=True)
class Images:
    """The digits, in two parts.

    Attributes:
        train: `[n, 64]` float32 in [0, 1].
        labels: `[n]` int64.
        test: Likewise, never trained on.
        test_labels: Likewise.
    """

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def load() -> Images:
        """Returns all of them.

        Example:
            >>> images = Images.load()
            >>> len(images.train), len(images.test)
            (1437, 360)
        """
        return Images(*load_split())

    def epochs(self, settings: DigitsSettings) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Yields for each epoch its batches, in an order of each seed's own.

        Images are `[seeds, batch, 64]`, labels `[seeds, batch]`.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
        for _ in range(settings.epochs):
            orders = [torch.randperm(len(self.train), generator=g) for g in generators]
            batches = torch.split(torch.stack(orders), settings.batch, dim=1)
            yield ((self.train[chosen], self.labels[chosen]) for chosen in batches)

    @torch.no_grad()
    def test_logits(self, model: nn.Module, seeds: int) -> Tensor:
        """Returns what each network says of the test images; computed as tensor cores do."""
        with emulate_tensor_cores():
            logits: Tensor = model(self.test.expand(seeds, -1, -1))
        return logits

    def accuracies(self, logits: Tensor) -> tuple[float, ...]:
        """Returns which share of the test images each network names rightly."""
        hits = (logits.argmax(dim=2) == self.test_labels).float().mean(dim=1)
        return tuple(hits.tolist())


def train_digits(
    regime: Regime, settings: DigitsSettings, on_epoch: Callable[[int], None]
) -> DigitsRun:
    """Trains one regime on the CPU, all seeds side by side.

    The loss is the sum over seeds of each network's mean cross-entropy, so each network's gradient
    is its own. A dynamic loss scale is shared: an overflow in one network skips the step of all.

    Args:
        regime: How weights are stored and the loss is scaled.
        settings: Everything else.
        on_epoch: Called after each epoch with the number of epochs done.

    Example:
        >>> from mpcore.demo.regimes import FP32
        >>> run = train_digits(FP32, DigitsSettings(epochs=1), lambda done: None)
        >>> len(run.accuracies), run.skipped_steps
        (3, 0)
    """
    started = time.perf_counter()
    images = Images.load()
    model, engine = prepare(
        SideBySideMLP((64, *settings.hidden, 10), settings.seeds),
        regime,
        settings.adamw,
        settings.scale,
    )
    tally = UpdateTally(engine)
    for done, batches in enumerate(images.epochs(settings), start=1):
        for inputs, labels in batches:
            with emulate_tensor_cores(), regime.arithmetic():
                engine.backward(summed_loss(model(inputs), labels))
            tally.step()
            engine.zero_grad()
        on_epoch(done)
    with regime.arithmetic():
        logits = images.test_logits(model, len(settings.seeds))
    return DigitsRun(
        regime=regime,
        accuracies=images.accuracies(logits),
        lost_updates=tally.fraction,
        skipped_steps=engine.skipped_steps,
        seconds=time.perf_counter() - started,
    )


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over seeds of the mean cross-entropy over the batch, in FP32."""
    seeds, batch, classes = logits.shape
    flat = F.cross_entropy(
        logits.float().reshape(seeds * batch, classes), labels.reshape(-1), reduction="sum"
    )
    return flat / batch
