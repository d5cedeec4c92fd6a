"""`mpcore bench --train`: bytes of whole training steps of the demo's GPT, by regime.

Activations are counted where autograd saves them for the backward pass
(`torch.autograd.graph.saved_tensors_hooks`), each storage once; parameters that are saved as well
are left out, they are counted as weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpcore.base import Table
from mpcore.bench.experiment import check_device
from mpcore.bench.timing import time_call
from mpcore.demo.model import GPT, GPTConfig, language_loss
from mpcore.demo.regimes import (
    AUTOCAST,
    BF16_MASTERS,
    BF16_NONE_BF16,
    BF16_NONE_INT8,
    BF16_SPLIT,
    BF16_SPLIT_BF16,
    BF16_SPLIT_INT8,
    FP16_MASTERS,
    FP16_SPLIT,
    FP32,
    AdamWSettings,
    Engine,
    Regime,
    prepare,
)
from mpcore.loss_scale import DynamicLossScale
from mpcore.monitoring.memory import SavedForBackward, resident_bytes

COMPACT = (BF16_SPLIT_BF16, BF16_SPLIT_INT8, BF16_NONE_BF16, BF16_NONE_INT8)
REGIMES = (FP32, FP16_MASTERS, FP16_SPLIT, BF16_MASTERS, BF16_SPLIT, *COMPACT, AUTOCAST)
_ADAMW = AdamWSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
_WARM_UP = 3


@dataclass(frozen=True)
class TrainSettings:
    """What is trained: by default the demo's GPT and batch.

    Attributes:
        config: The model's shape.
        batch: Sequences in a batch.
        device: Where.
        rounds: Timed steps, on a GPU.
    """

    config: GPTConfig = field(
        default_factory=lambda: GPTConfig(vocabulary=128, context=64, width=96, heads=4, layers=3)
    )
    batch: int = 8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 21


@dataclass(frozen=True)
class TrainBytes:
    """Bytes of a training step in one regime.

    Attributes:
        regime: The regime.
        parameters: Their number.
        weights: Of the model's parameters.
        gradients: Of their gradients.
        state: Of masters and moments.
        activations: Saved for the backward pass.
        seconds: Median of a whole step on a GPU; None on a CPU.
    """

    regime: Regime
    parameters: int
    weights: int
    gradients: int
    state: int
    activations: int
    seconds: float | None

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.state + self.activations


def saved_bytes(forward: Callable[[], object], parameters: list[Tensor]) -> int:
    """Runs `forward` and returns the bytes that autograd saved, parameters left out; no host sync.

    Args:
        forward: Builds a graph.
        parameters: Their storages do not count.

    Example:
        >>> weight = torch.ones(3, requires_grad=True)
        >>> values = torch.ones(3)
        >>> saved_bytes(lambda: (weight * values).exp(), [weight])  # values and the result
        24
    """
    saved = SavedForBackward(parameters)
    saved.start()
    try:
        forward()
    finally:
        size = saved.stop()
    return size


def run_training(settings: TrainSettings) -> tuple[TrainBytes, ...]:
    """Trains a few steps in each regime and counts; syncs with the host.

    Args:
        settings: What to train.

    Raises:
        ArgumentError: The device is not there.
    """
    check_device(settings.device)
    # of compact moments there are no kernels on a GPU to time
    some = [r for r in REGIMES if settings.device.type == "cpu" or not r.is_compact]
    return tuple(_train(regime, settings) for regime in some)


def _train(regime: Regime, settings: TrainSettings) -> TrainBytes:
    config, device = settings.config, settings.device
    model, engine = prepare(
        GPT(config, seed=0).to(device), regime, _ADAMW, DynamicLossScale(init=2.0**10)
    )
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, config.context + 1)
    text = torch.randint(config.vocabulary, shape, generator=generator).to(device)
    return measure(
        regime,
        model,
        engine,
        lambda: language_loss(model(text[:, :-1]), text[:, 1:].contiguous()),
        settings,
    )


def measure(
    regime: Regime,
    model: nn.Module,
    engine: Engine,
    loss_of: Callable[[], Tensor],
    settings: TrainSettings,
) -> TrainBytes:
    """Steps and counts the bytes of one regime; syncs with the host.

    Args:
        regime: How weights are stored.
        model: Ready for that regime.
        engine: Its optimizer.
        loss_of: Runs the model on a batch; autocast is put around it if the regime wants it.
        settings: Device and rounds.
    """
    parameters = list(model.parameters())

    def forward() -> Tensor:
        with _arithmetic(regime, settings.device):
            return loss_of()

    def step() -> None:
        engine.backward(forward())
        engine.step()
        engine.zero_grad()

    step()
    losses: list[Tensor] = []
    activations = saved_bytes(lambda: losses.append(forward()), list(parameters))
    engine.backward(losses.pop())
    resident = resident_bytes(engine)
    engine.step()
    engine.zero_grad()
    seconds = None
    if settings.device.type == "cuda":
        for _ in range(_WARM_UP):
            step()
        taken = [time_call(step, settings.device) for _ in range(settings.rounds)]
        seconds = statistics.median(taken)
    return TrainBytes(
        regime=regime,
        parameters=resident.parameters,
        weights=resident.weights,
        gradients=resident.gradients,
        state=resident.masters + resident.moments,
        activations=activations,
        seconds=seconds,
    )


def _arithmetic(regime: Regime, device: torch.device) -> AbstractContextManager[object]:
    if regime.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=regime.autocast)


def train_table(measured: tuple[TrainBytes, ...], settings: TrainSettings) -> Table:
    """Returns the table of shares of FP32.

    Args:
        measured: FP32 first.
        settings: What was trained.
    """
    fp32 = measured[0]
    timed = fp32.seconds is not None
    config = settings.config
    return Table(
        title=f"KiB of a training step: GPT of {fp32.parameters:,} parameters, batch "
        f"{settings.batch} x {config.context}",
        header=(
            *("Regime", "Weights", "Gradients", "State", "Activations", "vs FP32"),
            *("All vs FP32", *(("ms",) if timed else ())),
        ),
        rows=tuple(_train_cells(row, fp32) for row in measured),
        notes=(
            "Activations: what autograd saves for the backward pass, each storage once, "
            "parameters left out. State: masters and moments. All: these four.",
            "16-bit weights and gradients halve; float32 masters take back what they save, split "
            "ones half of it; 8-bit moments are those of weights with rows of 256 and more.",
            "Time: medians of whole steps."
            if timed
            else "No times: on a CPU 16-bit products are computed by way of FP32 or emulated, so a "
            "step says nothing about a GPU.",
        ),
    )


def _train_cells(row: TrainBytes, fp32: TrainBytes) -> tuple[str, ...]:
    parts = (row.weights, row.gradients, row.state, row.activations)
    seconds = () if row.seconds is None else (f"{1e3 * row.seconds:.2f}",)
    return (
        row.regime.label,
        *(f"{part / 1024:,.0f}" for part in parts),
        f"{row.activations / fp32.activations:.1%}",
        f"{row.total / fp32.total:.1%}",
        *seconds,
    )
