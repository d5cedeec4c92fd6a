"""Trainings with a fault, and healthy ones that look odd; what a `Monitor` says of each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.faulty import Layer

PLACES = ("first", "second", "third")
SETTINGS = ("float16", "accumulation", "closure", "clip", "bfloat16")
_BEFORE = 25  # clean steps before a fault


class Net(nn.Module):
    """Three layers; what is added to the outputs of one is a place for faults."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = Layer(), Layer(), Layer()
        self.register_buffer("shift", torch.zeros(4))
        self.added: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name in PLACES:
            x = getattr(self, name)(x) + self.added.get(name, 0.0)
            x = torch.tanh(x) if name != "third" and name not in self.added else x
        return x + self.get_buffer("shift")


@dataclass
class Training:
    """A model, its optimizer and monitor, and everything that was said."""

    setting: str = "float16"
    scale: Any = field(default_factory=lambda: mpcore.DynamicLossScale(2.0**10))
    model: Any = field(default_factory=Net)
    lr: float = 1e-2
    every: int = 10

    def __post_init__(self) -> None:
        self.dtype = torch.bfloat16 if self.setting == "bfloat16" else torch.float16
        self.model.to(self.dtype)
        params = [param for param in self.model.parameters() if param.requires_grad]
        inner = torch.optim.SGD(params, lr=self.lr)
        self.optimizer = mpcore.MixedPrecisionOptimizer(inner, self.scale)
        self.reports: list[mpcore.OverflowReport] = []
        self.monitor = mpcore.Monitor(self.optimizer, self.model, every=self.every, sinks=[self])
        self.steps = 0

    def __call__(self, record: Any) -> None:
        if isinstance(record, mpcore.OverflowReport):
            self.reports.append(record)

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.steps)
        return torch.randn(8, 4, generator=generator).to(self.dtype)

    def step(
        self,
        loss_of: Callable[[Tensor], Tensor] | None = None,
        edit: Callable[[Tensor], object] | None = None,
    ) -> None:
        """Takes a step; of several passes the last one has the odd loss and the edited batch."""

        def backward(last: bool = True) -> Tensor:
            x = self.batch()
            if last and edit is not None:
                edit(x)
            loss = square(self.model(x))
            loss = loss_of(loss) if last and loss_of is not None else loss
            self.optimizer.backward(loss)
            return loss

        if self.setting == "closure":
            self.optimizer.step(lambda: (self.optimizer.zero_grad(), backward())[1])
        else:
            for last in (False, True) if self.setting == "accumulation" else (True,):
                backward(last)
                if self.setting == "accumulation":
                    self.optimizer.accumulate()
            if self.setting == "clip":
                self.optimizer.clip_grad_norm_(1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def run(self, steps: int = _BEFORE, loss_of: Any = None) -> Training:
        for _ in range(steps):
            self.step(loss_of)
        return self


def square(output: Tensor) -> Tensor:
    return output.float().square().mean()


@dataclass(frozen=True)
class Said:
    """What was said of a training: verdicts that ask for something, and warnings.

    Attributes:
        verdicts: Their names and texts, with the gradients that overflowed.
        normal: Names of verdicts that ask for nothing.
        warned: Texts.
    """

    verdicts: list[tuple[str, str]]
    normal: list[str]
    warned: list[str]


def said_of(train: Callable[[], Training]) -> Said:
    logger = logging.getLogger("mpcore.monitor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training = train()
            training.monitor.close()
    finally:
        logger.setLevel(level)
    asking = [report for report in training.reports if not report.verdict.normal]
    return Said(
        [(r.verdict.name, f"{r.verdict} {[f.name for f in r.overflowed]}") for r in asking],
        [report.verdict.name for report in training.reports if report.verdict.normal],
        [str(one.message) for one in caught],
    )


@dataclass(frozen=True)
class Fault:
    """A training with a fault.

    Attributes:
        kind: Of the fault.
        place: In the model; "" is none.
        setting: Of the training.
        train: Runs it.
        verdict: What the first verdict that asks for something has to be, "warning" for a warning.
        part: What its text has to name.
    """

    kind: str
    place: str
    setting: str
    train: Callable[[], Training]
    verdict: str
    part: str = ""

    def is_right(self, said: Said) -> bool:
        if self.verdict == "warning":
            return any(self.part in text for text in said.warned)
        if not said.verdicts:
            return False
        name, text = said.verdicts[0]
        return name == self.verdict and self.part in text


def _weight(place: str, value: float, after: int = 0) -> Callable[[Training], None]:
    def put(training: Training) -> None:
        training.run(after)
        with torch.no_grad():
            getattr(training.model, place).weight[1, 2] = value
        training.optimizer.sync_masters_from_model()
        training.step()

    return put


def _activation(place: str, value: float) -> Callable[[Training], None]:
    def put(training: Training) -> None:
        training.model.added[place] = value
        training.step()

    return put


def _nan_backward(place: str) -> Callable[[Training], None]:
    def put(training: Training) -> None:
        bias = getattr(training.model, place).bias
        training.step(lambda loss: loss + (bias.float() * 0).abs().sqrt().sum())

    return put


def _gradient(place: str) -> Callable[[Training], None]:
    def put(training: Training) -> None:
        weight = getattr(training.model, place).weight
        handle = weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
        training.step()
        handle.remove()

    return put


def _batch(value: float) -> Callable[[Training], None]:
    return lambda training: training.step(edit=lambda x: x[3, 1].fill_(value))


def _buffer(training: Training) -> None:
    training.model.shift[1] = torch.inf
    training.step()


def _spike(training: Training) -> None:
    training.step(lambda loss: loss * (1e36 if training.dtype == torch.bfloat16 else 1e8))


def _saturated(training: Training) -> None:
    with torch.no_grad():
        training.model.third.weight.fill_(6e4)
    training.optimizer.sync_masters_from_model()
    training.step()


def faults() -> Iterator[Fault]:
    """Yields kind x place x setting, and what has no place."""
    inf, nan = float("inf"), float("nan")
    for setting in SETTINGS:

        def after(put: Callable[[Training], None], setting: str = setting) -> Any:
            def train() -> Training:
                training = Training(setting).run()
                put(training)
                return training

            return train

        for place in PLACES:
            weight, bias = f"{place}.weight", f"{place}.bias"
            many: list[tuple[str, Any, str, str]] = [
                ("a NaN in a weight", _weight(place, nan), "weights", weight),
                ("an infinite activation", _activation(place, inf), "forward", "before it was"),
                ("a NaN activation", _activation(place, nan), "forward", "nan before it was"),
                ("a NaN of the backward pass", _nan_backward(place), "nan", bias),
                ("an infinite gradient", _gradient(place), "spike", weight),
            ]
            if place == "first":  # tanh makes it finite: no step is skipped, a reading tells
                hidden = _weight(place, inf, after=4)
                many.append(("an infinite weight", hidden, "warning", f"step 29: {weight}"))
            else:
                many.append(("an infinite weight", _weight(place, inf), "weights", weight))
            for kind, put, verdict, part in many:
                yield Fault(kind, place, setting, after(put), verdict, part)
        for kind, put, verdict, part in (
            ("a NaN in the batch", _batch(nan), "forward", "nan before it was"),
            # tanh makes the loss finite: the backward pass has the NaN
            ("an infinite number in the batch", _batch(inf), "nan", "Look at the batch"),
            ("a poisoned buffer", _buffer, "buffers", "shift"),
            ("a spike of the loss", _spike, "spike", "the loss"),
        ):
            yield Fault(kind, "", setting, after(put), verdict, part)
        if setting != "bfloat16":
            yield Fault("weights near 65504", "", setting, after(_saturated), "saturated", "third")
        yield from _faults_of_scales(setting)


def _faults_of_scales(setting: str) -> Iterator[Fault]:
    top = mpcore.StaticLossScale(2.0**126)
    floor = mpcore.DynamicLossScale(2.0**120, min_scale=2.0**120, max_scale=2.0**126)
    low = mpcore.StaticLossScale(2.0**10)

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda loss: loss * factor + 0.5

    huge = 1e30 if setting == "bfloat16" else 1.0
    yield Fault(
        *("a scale that is too high for ever", "", setting),
        train=lambda: Training(setting, top).run(3, times(huge)),
        verdict="static",
    )
    yield Fault(
        *("a scale at its minimum", "", setting),
        train=lambda: Training(setting, floor).run(3, times(huge)),
        verdict="floor",
    )
    if setting != "accumulation":  # where the other pass has gradients
        yield Fault(
            *("gradients that are all 0", "", setting),
            train=lambda: Training(setting, low).run(70, times(0.0)),
            verdict="warning",
            part="all gradients were 0",
        )
    yield Fault(
        *("updates that are all lost", "", setting),
        train=lambda: Training(setting, low, lr=1e-13).run(70),
        verdict="warning",
        part="no weight moves",
    )
