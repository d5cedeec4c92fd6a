"""Gradients of activations that FP16 would lose, as training converges.

The model is trained and differentiated in FP32, so that nothing is lost before it is counted. What
is counted are the gradients of each layer's output before its ReLU: what a backward pass in FP16
would have to hold, at a loss scale of 1 and at others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.base import Table
from mpcore.demo.digits import DigitsSettings, Images, SideBySideMLP, summed_loss
from mpcore.demo.reproduce.loss_scaling import LEARNING_RATE, MOMENTUM

SCALES = (1.0, 8.0, 128.0, 2.0**15)
SETTINGS = DigitsSettings(seeds=(0, 1, 2, 3, 4), epochs=60, batch=64)
EPOCHS = (0, 5, 15, 30, 60)
COUNTED = 256  # images in a batch whose gradients are counted
LOWEST, HIGHEST = -40, 0  # exponents of the histogram
_FLUSHED, _NORMAL = 2.0**-25, 2.0**-14  # up to the first all become 0; from the second on normal


@dataclass(frozen=True)
class GradientCounts:
    """What the gradients of one epoch are, as shares of all.

    Attributes:
        zero: 0 in FP32 already.
        lost: By loss scale, what FP16 would make 0.
        subnormal: What FP16 would hold with fewer digits, at a scale of 1.
        normal: The rest.
        histogram: Shares by binary exponent, from `LOWEST` to `HIGHEST`.
    """

    zero: float
    lost: dict[float, float]
    subnormal: float
    normal: float
    histogram: tuple[float, ...]


def count(gradients: Tensor) -> GradientCounts:
    """Counts gradients by what FP16 would make of them.

    Args:
        gradients: float32, any number.

    Example:
        >>> found = count(torch.tensor([0.0, 2.0**-25, 2.0**-20, 1.0]))
        >>> found.zero, found.lost[1.0], found.lost[8.0], found.subnormal, found.normal
        (0.25, 0.25, 0.0, 0.25, 0.25)
    """
    sizes = gradients.double().abs().flatten()
    some = sizes > 0

    def share(hits: Tensor) -> float:
        return float(hits.double().mean())

    _, exponents = torch.frexp(sizes[some])
    places = (exponents - 1).clamp(LOWEST, HIGHEST) - LOWEST
    bins = torch.bincount(places.long(), minlength=HIGHEST - LOWEST + 1).double() / len(sizes)
    return GradientCounts(
        zero=share(~some),
        lost={scale: share(some & (sizes * scale <= _FLUSHED)) for scale in SCALES},
        subnormal=share((sizes > _FLUSHED) & (sizes < _NORMAL)),
        normal=share(sizes >= _NORMAL),
        histogram=tuple(bins.tolist()),
    )


def measure(
    settings: DigitsSettings, on_run: Callable[[str, int], Callable[[int], None]]
) -> dict[int, GradientCounts]:
    """Trains in FP32 with SGD and counts at some epochs, over all whole batches of the images.

    Args:
        settings: Seeds and epochs; counted at those of `EPOCHS` that it reaches.
        on_run: Hears the name of the run and its epochs; returns what hears of each epoch.
    """
    images = Images.load()
    model = SideBySideMLP((64, *settings.hidden, 10), settings.seeds)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    on_epoch = on_run("FP32, gradients counted", settings.epochs)
    found = {0: count(_gradients(model, images, settings))}
    for done, batches in enumerate(images.epochs(settings), start=1):
        for inputs, labels in batches:
            sgd.zero_grad()
            summed_loss(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            sgd.step()
        if done in EPOCHS:
            found[done] = count(_gradients(model, images, settings))
        on_epoch(done)
    return found


def _gradients(model: SideBySideMLP, images: Images, settings: DigitsSettings) -> Tensor:
    """Returns the gradients of all layers' outputs, of one pass over the images in batches."""
    parts, seeds = [], len(settings.seeds)
    for start in range(0, len(images.train) - COUNTED + 1, COUNTED):
        here = slice(start, start + COUNTED)
        outputs = model.layers(images.train[here].expand(seeds, -1, -1))[::2]
        loss = summed_loss(outputs[-1], images.labels[here].expand(seeds, -1))
        parts += [grad.flatten() for grad in torch.autograd.grad(loss, outputs)]
    return torch.cat(parts)


def tables(found: dict[int, GradientCounts], settings: DigitsSettings) -> tuple[Table, ...]:
    """Returns shares by epoch, and a histogram of the first and the last one."""
    shares = Table(
        title="Gradients of activations in FP16, in % of all",
        header=(
            *("Epoch", "0 in FP32", "lost, 1", "subnormal, 1", "normal, 1"),
            *("lost, 8", "lost, 128", "lost, 2^15"),
        ),
        rows=tuple(
            (
                str(epoch),
                *(f"{100 * share:.1f}" for share in _in_order(counts)),
            )
            for epoch, counts in found.items()
        ),
        notes=(
            f"Of every layer's output before its ReLU, {len(settings.seeds)} seeds, in batches of "
            f"{COUNTED}; the numbers behind the names are loss scales. Trained in FP32 with SGD at "
            f"a learning rate of {LEARNING_RATE:g}, momentum {MOMENTUM:g}, {settings.batch} images "
            "a step.",
        ),
    )
    first, last = found[min(found)], found[max(found)]
    rows = tuple(
        (f"2^{LOWEST + i}", f"{100 * a:.1f}", _bar(a), f"{100 * b:.1f}", _bar(b))
        for i, (a, b) in enumerate(zip(first.histogram, last.histogram, strict=True))
        if max(a, b) >= 0.0005
    )
    return shares, Table(
        title="Gradients of activations by binary exponent, in % of all",
        header=("Exponent", f"epoch {min(found)}", "", f"epoch {max(found)}", ""),
        rows=rows,
        notes=(
            f"FP16 makes 0 of what is below 2^-25 and keeps all digits from 2^-14 on. What is "
            f"smaller than 2^{LOWEST} is counted there.",
        ),
    )


def _in_order(counts: GradientCounts) -> tuple[float, ...]:
    first, *others = counts.lost.values()
    return (counts.zero, first, counts.subnormal, counts.normal, *others)


def _bar(share: float) -> str:
    return "#" * round(200 * share)
