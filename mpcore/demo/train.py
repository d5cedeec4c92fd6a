"""Training the small GPT in one regime, and recording what happened."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpcore.demo.data import VOCABULARY, Corpus, draw_offsets, spread_offsets, windows_at
from mpcore.demo.measure import SubnormalTally, UpdateTally
from mpcore.demo.model import GPT, GPTConfig, language_loss
from mpcore.demo.regimes import AdamWSettings, Engine, Regime, prepare
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.loss_scale import DynamicLossScale
from mpcore.monitoring.memory import Resident, resident_bytes
from mpcore.monitoring.monitor import Monitor
from mpcore.monitoring.records import Record
from mpcore.monitoring.run_log import RunLog
from mpcore.precision import emulate_tensor_cores

_READINGS = 20  # of gradients, in a run


@dataclass(frozen=True)
class GPTSettings:
    """Everything that the GPT runs have in common; a regime adds nothing but its precision.

    `loss_weight` multiplies the loss before anything else. A mean over the 512 characters of this
    batch times 2^-10 gives each character the weight it has in a mean over 2^19, the batch of a
    large run. AdamW's eps is multiplied by it too, so that in exact arithmetic the weight changes
    nothing; as it is a power of two, it changes no bit of the FP32 run either.

    Attributes:
        steps: Optimizer steps, skipped ones included.
        batch: Windows in a batch.
        config: The model's shape.
        lr: Peak learning rate: linear warm-up, then half a cosine down to 0.
        warmup: Steps of warm-up.
        betas: AdamW's.
        eps: AdamW's, before it is multiplied by the loss weight.
        weight_decay: AdamW's.
        loss_weight: A power of two.
        scale: The loss scale of the scaled regimes that have none of their own.
        validation_windows: Windows of held-out text, always the same; read after the last step.
    """

    steps: int = 400
    batch: int = 8
    config: GPTConfig = field(
        default_factory=lambda: GPTConfig(VOCABULARY, context=64, width=96, heads=4, layers=3)
    )
    lr: float = 1e-3
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    loss_weight: float = 2.0**-10
    scale: DynamicLossScale = field(
        default_factory=lambda: DynamicLossScale(
            init=2.0**28, growth_interval=50, max_scale=2.0**40
        )
    )
    validation_windows: int = 128

    @property
    def adamw(self) -> AdamWSettings:
        """What AdamW is called with."""
        return AdamWSettings(self.lr, self.betas, self.eps * self.loss_weight, self.weight_decay)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        Example:
            >>> settings = GPTSettings(steps=100, lr=1.0, warmup=10)
            >>> settings.lr_at(4), settings.lr_at(10), round(settings.lr_at(55), 6)
            (0.5, 1.0, 0.5)
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * progress))


@dataclass(frozen=True)
class Run:
    """What one regime did with one seed.

    Attributes:
        regime: The regime.
        seed: Seed of the initial weights and of the batches.
        train_losses: Loss of each step's batch, before the step, without the loss weight.
        validation_loss: After the last step.
        scales: The scale that each step's loss was multiplied by.
        skipped: The steps, counted from 0, that an overflow cancelled.
        final_scale: The scale after the last step.
        lost_updates: Share of the non-zero updates that rounding lost.
        subnormal: Share of 16-bit gradient values that are subnormal; None if there are none.
        resident: Bytes that stay in memory.
        parameters: Number of parameters.
        seconds: Wall-clock time.
        log: What a monitor told of it, its losses with the loss weight; None of an optimizer that
            is not mpcore's.
    """

    regime: Regime
    seed: int
    train_losses: tuple[float, ...]
    validation_loss: float
    scales: tuple[float, ...]
    skipped: tuple[int, ...]
    final_scale: float
    lost_updates: float
    subnormal: float | None
    resident: Resident
    parameters: int
    seconds: float
    log: RunLog | None = None


OnStep = Callable[[int, float], None]


def train_gpt(
    regime: Regime, settings: GPTSettings, corpus: Corpus, seed: int, on_step: OnStep
) -> Run:
    """Trains the GPT in one regime on the CPU.

    Args:
        regime: How weights are stored and the loss is scaled.
        settings: Everything else.
        corpus: The text.
        seed: Seed of the initial weights and of the batches, whatever the regime.
        on_step: Called after each step with the number of steps done and the batch's loss.

    Example:
        >>> from mpcore.demo.data import load_corpus
        >>> from mpcore.demo.regimes import FP16_MASTERS
        >>> settings = GPTSettings(steps=2, config=GPTConfig(128, 16, 16, 2, 1))
        >>> run = train_gpt(FP16_MASTERS, settings, load_corpus(), 0, lambda done, loss: None)
        >>> len(run.train_losses)
        2
    """
    started = time.perf_counter()
    loop = _Loop(regime, settings, corpus, seed)
    with warnings.catch_warnings():
        # what it warns of is what the regime without a loss scale is there to show
        warnings.filterwarnings("ignore", "float16 gradients flush to 0")
        for step in range(settings.steps):
            loop.step(step)
            on_step(step + 1, loop.train_losses[-1])
    return Run(
        regime=regime,
        seed=seed,
        train_losses=tuple(loop.train_losses),
        validation_loss=loop.validation_loss(),
        scales=tuple(loop.scales),
        skipped=tuple(loop.skipped),
        final_scale=loop.engine.loss_scale,
        lost_updates=loop.tally.fraction,
        subnormal=loop.gradients.fraction,
        resident=loop.resident,
        parameters=sum(p.numel() for p in loop.model.parameters()),
        seconds=time.perf_counter() - started,
        log=loop.close(),
    )


class _Loop:
    """The state of a run between two steps."""

    def __init__(self, regime: Regime, settings: GPTSettings, corpus: Corpus, seed: int) -> None:
        self.settings = settings
        self.regime = regime
        self.corpus = corpus
        self.model: nn.Module
        self.engine: Engine
        self.model, self.engine = prepare(
            GPT(settings.config, seed), regime, settings.adamw, settings.scale
        )
        self.records: list[Record] = []
        self.monitor: Monitor | None = None
        if isinstance(self.engine, MixedPrecisionOptimizer):
            every = max(1, settings.steps // _READINGS)
            sinks = [self.records.append]
            self.monitor = Monitor(self.engine, self.model, every=every, sinks=sinks)
        self.tally = UpdateTally(self.engine)
        self.gradients = SubnormalTally()
        context = settings.config.context
        self.offsets = draw_offsets(
            len(corpus.train), settings.steps, settings.batch, context, seed
        )
        self.held_out = spread_offsets(len(corpus.validation), settings.validation_windows, context)
        self.train_losses: list[float] = []
        self.scales: list[float] = []
        self.skipped: list[int] = []

    def step(self, step: int) -> None:
        self.scales.append(self.engine.loss_scale)
        with emulate_tensor_cores():
            loss = self._loss(self.corpus.train, self.offsets[step])
            self.engine.backward(loss * self.settings.loss_weight)
        self.train_losses.append(loss.item())
        self.gradients.count(self.model.parameters())
        for group in self.engine.param_groups:
            group["lr"] = self.settings.lr_at(step)
        if self.tally.step():
            self.skipped.append(step)
        if step + 1 == self.settings.steps:
            self.resident = resident_bytes(self.engine)
        self.engine.zero_grad()

    def close(self) -> RunLog | None:
        if self.monitor is None:
            return None
        self.monitor.close()
        return RunLog.of(self.regime.label, self.records)

    def _loss(self, text: Tensor, offsets: Tensor) -> Tensor:
        inputs, targets = windows_at(text, offsets, self.settings.config.context)
        with self.regime.arithmetic():
            logits = self.model(inputs)
        return language_loss(logits, targets)

    @torch.no_grad()
    def validation_loss(self) -> float:
        total = 0.0
        with emulate_tensor_cores():
            for chunk in torch.split(self.held_out, 32):
                total += self._loss(self.corpus.validation, chunk).item() * len(chunk)
        return total / len(self.held_out)
