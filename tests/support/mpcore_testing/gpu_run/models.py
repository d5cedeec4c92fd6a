"""A GPT in the sizes that are trained, and the regimes that train it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mpcore
import torch
from mpcore.demo.model import GPT, GPTConfig
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        label: What tables call it.
        config: Its shape.
        batch: Sequences at the most; halved until FP32 fits.
    """

    label: str
    config: GPTConfig
    batch: int


def _config(vocabulary: int, context: int, width: int, heads: int, layers: int) -> GPTConfig:
    return GPTConfig(vocabulary, context, width, heads, layers)


#: Vocabularies are padded to a multiple of 64, as is usual; the output layer shares the embedding.
MODELS = {
    "gpt2": Model("GPT-2 124M", _config(50304, 1024, 768, 12, 12), 32),
    "1.3b": Model("GPT 1.3B", _config(50304, 1024, 2048, 16, 24), 8),
    "tiny": Model("a tiny GPT", _config(64, 8, 16, 2, 1), 2),
}


def build(config: GPTConfig, device: torch.device) -> GPT:
    """A GPT whose numbers are drawn on the device: drawing 1.3 billion on a CPU takes too long."""
    with torch.device("meta"):
        model = GPT(config, seed=0)
    model = model.to_empty(device=device)
    model.head.weight = model.token.weight
    _initialise(model, torch.Generator(device).manual_seed(0))
    return model


@torch.no_grad()
def _initialise(model: GPT, generator: torch.Generator) -> None:
    """As in GPT-2: 0.02, less for what writes into the residual stream."""
    into_residual = 1 / math.sqrt(2 * model.config.layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            ends = name.endswith(("attention.out", "mlp.2"))
            module.weight.normal_(0.0, 0.02 * (into_residual if ends else 1), generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


@dataclass(frozen=True)
class Regime:
    """One way to train.

    Attributes:
        key: Short name.
        label: What tables call it.
        tf32: Whether FP32 products may use TF32.
        autocast: Dtype of torch.autocast, or None.
        scaled: Whether the loss is scaled.
        weights: Dtype of mpcore's weights; None: torch alone.
    """

    key: str
    label: str
    tf32: bool = False
    autocast: torch.dtype | None = None
    scaled: bool = False
    weights: torch.dtype | None = None

    def arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of the forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


_HALF, _BRAIN = torch.float16, torch.bfloat16
#: the most wanted first, in case the time is used up
REGIMES = (
    Regime("fp32", "FP32"),
    Regime("mpcore-fp16", "mpcore FP16", tf32=True, scaled=True, weights=_HALF),
    Regime("amp-fp16", "FP16 autocast, GradScaler", tf32=True, autocast=_HALF, scaled=True),
    Regime("tf32", "FP32 with TF32", tf32=True),
    Regime("mpcore-bf16", "mpcore BF16", tf32=True, weights=_BRAIN),
    Regime("amp-bf16", "BF16 autocast", tf32=True, autocast=_BRAIN),
)
_ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_INIT_SCALE = 2.0**15
_MAX_NORM = 1.0


@dataclass(frozen=True)
class Trainer:
    """A model and how to take its steps.

    Attributes:
        backward: Scales a loss and backpropagates it.
        step: Unscales, clips, updates and drops the gradients.
        skipped: How many steps were skipped; syncs with the host.
    """

    model: nn.Module
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    skipped: Callable[[], int]


def trainer(model: nn.Module, regime: Regime, device: torch.device) -> Trainer:
    """Makes a fresh FP32 model ready for a regime.

    On a CPU mpcore computes with the reference backend: other parts rehearse the kernels.
    """
    make = _torch if regime.weights is None else _mpcore
    return make(model, regime, device)


def _mpcore(model: nn.Module, regime: Regime, device: torch.device) -> Trainer:
    assert regime.weights is not None
    scale = mpcore.DynamicLossScale(init=_INIT_SCALE) if regime.scaled else mpcore.NoLossScale()
    inner = torch.optim.AdamW(model.parameters(), **_ADAMW)
    backend = "triton" if device.type == "cuda" else "reference"
    optimizer = mpcore.MixedPrecisionOptimizer(inner, scale, backend=backend, path="fused")
    model = mpcore.cast_model(model, regime.weights, optimizer)

    def step() -> None:
        optimizer.clip_grad_norm_(_MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(model, optimizer.backward, step, lambda: optimizer.skipped_steps)


def _torch(model: nn.Module, regime: Regime, device: torch.device) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), **_ADAMW, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=_INIT_SCALE, enabled=regime.scaled)

    def backward(loss: Tensor) -> None:
        scaler.scale(loss).backward()

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def skipped() -> int:
        return round(math.log2(_INIT_SCALE / scaler.get_scale())) if regime.scaled else 0

    return Trainer(model, backward, step, skipped)
