"""The precision regimes under comparison, and what turns one into a model with an optimizer.

Every regime starts from the same FP32 model. Layer norms keep FP32 parameters in all of them
(`mpcore.cast_model` does that by default), and losses are computed in FP32 from the logits.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mpcore.backends import resolve
from mpcore.demo.rounded import RoundedAdamW
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.loss_scale import HeadroomLossScale, LossScale, NoLossScale
from mpcore.precision import cast_model


@dataclass(frozen=True)
class Regime:
    """One way to store weights and to scale the loss.

    Attributes:
        key: Short name.
        label: What tables and plots call it.
        weights: Dtype of the model's weights.
        masters: Whether updates accumulate in FP32.
        scaled: Whether the loss is scaled dynamically.
        autocast: Dtype that FP32 weights are cast to where they are used; None for no autocast.
        own_scale: Its loss scale; None for the one that all scaled regimes share.
        store: How masters lie in memory.
        moments: How moments do.
    """

    key: str
    label: str
    weights: torch.dtype
    masters: bool
    scaled: bool
    autocast: torch.dtype | None = None
    own_scale: LossScale | None = None
    store: Literal["float32", "split", "none"] = "float32"
    moments: Literal["float32", "bfloat16", "int8"] = "float32"

    @property
    def keeps_masters(self) -> bool:
        """Whether a 16-bit weight has an FP32 master."""
        return self.masters and self.weights != torch.float32

    @property
    def is_compact(self) -> bool:
        """Whether only fused updates know how its state is kept."""
        return self.store == "none" or self.moments != "float32"

    def arithmetic(self) -> AbstractContextManager[object]:
        """Returns the context in which the model's forward pass runs.

        Example:
            >>> with AUTOCAST.arithmetic():
            ...     torch.is_autocast_enabled("cpu")
            True
        """
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.autocast)


FP32 = Regime("fp32", "FP32", torch.float32, masters=True, scaled=False)
FP16_MASTERS = Regime(
    "fp16-masters", "FP16 + masters + scaling", torch.float16, masters=True, scaled=True
)
FP16_HEADROOM = Regime(
    "fp16-headroom",
    "FP16 + masters + headroom",
    torch.float16,
    masters=True,
    scaled=True,
    own_scale=HeadroomLossScale(init=2.0**28, max_scale=2.0**40),
)
BF16_MASTERS = Regime("bf16-masters", "BF16 + masters", torch.bfloat16, masters=True, scaled=False)
FP16_SPLIT = Regime(
    "fp16-split",
    "FP16 + split masters + scaling",
    torch.float16,
    masters=True,
    scaled=True,
    store="split",
)
BF16_SPLIT = Regime(
    "bf16-split", "BF16 + split masters", torch.bfloat16, masters=True, scaled=False, store="split"
)
BF16_SPLIT_BF16 = replace(
    BF16_SPLIT,
    key="bf16-split-bf16",
    label="BF16 + split masters, BF16 moments",
    moments="bfloat16",
)
BF16_SPLIT_INT8 = replace(
    BF16_SPLIT,
    key="bf16-split-int8",
    label="BF16 + split masters, 8-bit moments",
    moments="int8",
)
BF16_NONE_BF16 = replace(
    BF16_SPLIT_BF16,
    key="bf16-none-bf16",
    label="BF16 rounded at random, BF16 moments",
    store="none",
)
BF16_NONE_INT8 = replace(
    BF16_SPLIT_INT8,
    key="bf16-none-int8",
    label="BF16 rounded at random, 8-bit moments",
    store="none",
)
AUTOCAST = Regime(
    "autocast",
    "FP16 autocast + scaling",
    torch.float32,
    masters=True,
    scaled=True,
    autocast=torch.float16,
)
FP16_UNSCALED = Regime(
    "fp16-no-scaling", "FP16 + masters, no scaling", torch.float16, masters=True, scaled=False
)
FP16_ROUNDED = Regime(
    "fp16-no-masters", "FP16 + scaling, no masters", torch.float16, masters=False, scaled=True
)
BF16_ROUNDED = Regime(
    "bf16-no-masters", "BF16, no masters", torch.bfloat16, masters=False, scaled=False
)

GPT_REGIMES = (
    FP32,
    FP16_MASTERS,
    FP16_HEADROOM,
    BF16_MASTERS,
    AUTOCAST,
    FP16_UNSCALED,
    FP16_ROUNDED,
    BF16_ROUNDED,
)
DIGITS_REGIMES = (FP32, FP16_MASTERS, FP16_ROUNDED, BF16_MASTERS, BF16_ROUNDED)


@dataclass(frozen=True)
class AdamWSettings:
    """What AdamW is called with, in every regime the same."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Engine(Protocol):
    """What a training loop needs from an optimizer; `MixedPrecisionOptimizer` is one."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]

    @property
    def loss_scale(self) -> float:
        """The scale of the next loss."""

    @property
    def skipped_steps(self) -> int:
        """How many steps an overflow has cancelled."""

    def backward(self, loss: Tensor) -> None:
        """Backpropagates the loss, scaled."""

    def step(self) -> object:
        """Updates the parameters."""

    def zero_grad(self) -> None:
        """Drops the gradients."""


class PlainAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` itself, unscaled: the FP32 regime owes nothing to mpcore.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = PlainAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> optimizer.backward(weight.sum())
        >>> optimizer.step()
        >>> round(weight.item(), 4)
        0.9
    """

    loss_scale = 1.0
    skipped_steps = 0

    def backward(self, loss: Tensor) -> None:
        """Backpropagates the loss as it is."""
        loss.backward()  # type: ignore[no-untyped-call]


def prepare(
    model: nn.Module, regime: Regime, adamw: AdamWSettings, scale: LossScale, seed: int = 0
) -> tuple[nn.Module, Engine]:
    """Casts a fresh FP32 model for a regime and builds its optimizer, without a host sync.

    Args:
        model: FP32 model. Its weights are cast in place.
        regime: How to store and scale.
        adamw: Settings of the update.
        scale: The loss scale of the scaled regimes that have none of their own.
        seed: Of what is rounded at random.

    Returns:
        The model to call, and its optimizer.

    Example:
        >>> from mpcore.loss_scale import DynamicLossScale
        >>> settings = AdamWSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        >>> model, engine = prepare(
        ...     nn.Linear(2, 2), BF16_ROUNDED, settings, DynamicLossScale()
        ... )
        >>> model.weight.dtype, engine.loss_scale
        (torch.bfloat16, 1.0)
    """
    loss_scale: LossScale = (regime.own_scale or scale) if regime.scaled else NoLossScale()
    if not regime.masters:
        model = cast_model(model, regime.weights)
        return model, RoundedAdamW(
            model.parameters(),
            adamw.lr,
            adamw.betas,
            adamw.eps,
            adamw.weight_decay,
            loss_scale,
        )
    # a subclass has no fused update
    kind = torch.optim.AdamW if regime.is_compact else PlainAdamW
    backend: Literal["auto", "compiled", "reference"] = "auto"
    if regime.is_compact:
        best, _ = resolve("auto", {param.device for param in model.parameters()})
        backend = "compiled" if best == "compiled" else "reference"  # which know compact moments
    plain = kind(
        model.parameters(),
        lr=adamw.lr,
        betas=adamw.betas,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    if isinstance(plain, PlainAdamW) and regime == FP32:  # not the same object elsewhere
        return model, plain
    kept: dict[str, Any] = {"masters": regime.store, "moments": regime.moments, "seed": seed}
    optimizer = MixedPrecisionOptimizer(plain, loss_scale, backend=backend, **kept)
    if regime.keeps_masters:
        model = cast_model(model, regime.weights, optimizer)
    return model, optimizer
