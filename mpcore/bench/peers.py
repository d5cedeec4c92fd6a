"""Other libraries' optimizers, each in its own regime, where they are installed and can run.

They are loaded by name when their row is built: none of them is a requirement of this package.
Their steps clip with `torch.nn.utils.clip_grad_norm_` unless they bring a clip of their own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.bench.contenders import Contender
from mpcore.bench.problem import ADAMW, MAX_NORM, Problem
from mpcore.bench.rows import TORCH_NORM_BOUND, Bound, Row
from mpcore.bench.traffic import NOT_STATED

Params = Sequence[nn.Parameter]

# the gradient is rounded again when it is clipped, the weight in each of three steps
_KAHAN = Bound(2**-8, 0.1, True, "16-bit gradients and moments, compensated weights")
_ROUNDED = Bound(3 * 2**-8, 0.5, False, "weights rounded to BF16 in every step, 8-bit moments")


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Attributes:
        package: What is imported.
        name: What pip installs.
        regime: Formats.
        devices: Where it runs.
        bound: When its result counts as right.
        expected_bytes: Per parameter at the most.
        make: Returns the optimizer for bfloat16 parameters.
        scaled: Whether it is the wrapper with a loss scale, on float16 parameters.
        compiled: Whether its step runs code of torch.compile.
    """

    package: str
    name: str
    regime: str
    devices: tuple[str, ...]
    bound: Bound
    expected_bytes: float
    make: Callable[[Params], Any]
    scaled: bool = False
    compiled: bool = False


def _load(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def _optimi(params: Params) -> Any:
    return _load("optimi", "AdamW")(params, **ADAMW, kahan_sum=True)


def _bitsandbytes(params: Params) -> Any:
    return _load("bitsandbytes.optim", "AdamW8bit")(params, **ADAMW)


def _torchao(params: Params) -> Any:
    return _load("torchao.optim", "AdamW8bit")(params, **ADAMW, bf16_stochastic_round=True)


def _pytorch_optimizer(params: Params) -> Any:
    wrap = _load("pytorch_optimizer.optimizer.fp16", "SafeFP16Optimizer")
    return wrap(torch.optim.AdamW(params, **ADAMW, fused=True))


def _mpadam(params: Params) -> Any:
    return _load("mpadam", "MPAdamW")(params, **ADAMW, config="large")


def _flashoptim(params: Params) -> Any:
    return _load("flashoptim", "FlashAdamW")(params, **ADAMW, master_weight_bits=24)


def _apex(params: Params) -> Any:
    make = _load("apex.optimizers", "FusedAdam")
    return make(params, **ADAMW, adam_w_mode=True, capturable=True, master_weights=True)


def _transformer_engine(params: Params) -> Any:
    make = _load("transformer_engine.pytorch.optimizers", "FusedAdam")
    return make(params, **ADAMW, adam_w_mode=True, master_weights=True)


_BOTH, _CUDA = ("cpu", "cuda"), ("cuda",)
_MASTERS = "BF16 weights and gradients, FP32 masters and moments; no loss scale"
_EIGHT = "BF16 weights and gradients, 8-bit moments, no masters; no loss scale"
PEERS = (
    Peer(
        package="optimi",
        name="torch-optimi",
        regime="BF16 weights, gradients and moments, Kahan; no loss scale",
        devices=_BOTH,
        bound=_KAHAN,
        expected_bytes=12,
        make=_optimi,
    ),
    Peer(
        package="bitsandbytes",
        name="bitsandbytes",
        regime=_EIGHT,
        devices=_BOTH,
        bound=_ROUNDED,
        expected_bytes=30,
        make=_bitsandbytes,
    ),
    Peer(
        package="torchao",
        name="torchao",
        regime=f"{_EIGHT}; stochastic rounding; compiled",
        devices=_BOTH,
        bound=_ROUNDED,
        expected_bytes=10,
        make=_torchao,
        compiled=True,
    ),
    Peer(
        package="pytorch_optimizer",
        name="pytorch_optimizer",
        regime="FP16 weights and gradients; FP32 masters, gradients, moments",
        devices=_BOTH,
        bound=TORCH_NORM_BOUND,
        expected_bytes=20,
        make=_pytorch_optimizer,
        scaled=True,
    ),
    Peer(
        package="mpadam",
        name="mpadam",
        regime="BF16 weights and gradients, 56 bits of state; no loss scale",
        devices=_CUDA,
        bound=_ROUNDED,
        expected_bytes=11,
        make=_mpadam,
    ),
    Peer(
        package="flashoptim",
        name="flashoptim",
        regime="24-bit weights, BF16 gradients, 8-bit moments; no loss scale",
        devices=_CUDA,
        bound=_ROUNDED,
        expected_bytes=8,
        make=_flashoptim,
    ),
    Peer(
        package="apex",
        name="Apex",
        regime=_MASTERS,
        devices=_CUDA,
        bound=_ROUNDED,
        expected_bytes=16,
        make=_apex,
    ),
    Peer(
        package="transformer_engine",
        name="TransformerEngine",
        regime=_MASTERS,
        devices=_CUDA,
        bound=_ROUNDED,
        expected_bytes=16,
        make=_transformer_engine,
    ),
)


class Unscaled(Contender):
    """A peer without a loss scale: BF16 gradients are clipped in place, then it steps.

    Args:
        problem: Weights and gradients.
        peer: Which.
    """

    scaled = False

    def __init__(self, problem: Problem, peer: Peer) -> None:
        super().__init__(problem, torch.bfloat16)
        self.compiled = peer.compiled
        self._optimizer = peer.make(self.params)

    def before_step(self) -> None:
        """Does nothing."""

    def step(self) -> None:
        """Clips, steps."""
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self._optimizer.step()

    def weight(self, index: int) -> Tensor:
        """Returns the weight, with what it keeps beside it where that is a tensor to be added."""
        param = self.params[index]
        state = self._optimizer.state.get(param) or {}
        weight = param.detach().float()
        for name in ("master_param", "kahan_comp"):
            kept = state.get(name)
            if isinstance(kept, Tensor) and kept.shape == weight.shape:
                return kept.float() if name == "master_param" else weight + kept.float()
        return weight

    def state(self) -> Any:
        """Returns the optimizer's state."""
        return dict(self._optimizer.state)


class ScaledWrapper(Contender):
    """`SafeFP16Optimizer` of pytorch_optimizer: FP16 parameters, masters and a scale of its own.

    Args:
        problem: Weights and gradients.
        peer: Which.
    """

    def __init__(self, problem: Problem, peer: Peer) -> None:
        super().__init__(problem, torch.float16)
        self._wrapper = peer.make(self.params)
        self._wrapper.scaler.loss_scale = problem.scale

    def before_step(self) -> None:
        """Says that there are gradients to be widened, as its `backward` does."""
        self._wrapper.needs_sync = True

    def step(self) -> None:
        """Widens, unscales, clips and looks for overflow; steps; copies back."""
        self._wrapper.clip_main_grads(MAX_NORM)
        self._wrapper.step()

    def weight(self, index: int) -> Tensor:
        """Returns the master."""
        master: Tensor = self._wrapper.fp32_params[index]
        return master.detach()

    def state(self) -> Any:
        """Returns masters, their gradients and moments."""
        masters = self._wrapper.fp32_params
        grads = [master.grad for master in masters]
        return [*masters, grads, dict(self._wrapper.optimizer.state)]


def peer_rows(device: torch.device) -> tuple[Row, ...]:
    """Returns a row for every peer; those that are absent or run elsewhere say so.

    Args:
        device: Where the step would run.

    Example:
        >>> {row.key: row.missing for row in peer_rows(torch.device("cpu"))}["apex"]
        'not installed'
    """
    return tuple(_row(peer, device) for peer in PEERS)


def _row(peer: Peer, device: torch.device) -> Row:
    missing = None
    if importlib.util.find_spec(peer.package) is None:
        missing = "not installed"
    elif device.type not in peer.devices:
        missing = f"runs on {' and '.join(peer.devices)} only"
    make = ScaledWrapper if peer.scaled else Unscaled
    return Row(
        key=peer.package,
        label=peer.name,
        regime=peer.regime,
        make=lambda problem: make(problem, peer),
        traffic=NOT_STATED,
        bound=peer.bound,
        expected_bytes=peer.expected_bytes,
        missing=missing,
        version=None if missing else version_of(peer.package),
    )


def version_of(package: str) -> str | None:
    """Returns the version of what installed a package; None of a package without metadata.

    Args:
        package: What is imported, which may be called otherwise by pip.

    Example:
        >>> version_of("torch") == torch.__version__
        True
    """
    installed_by = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(installed_by[0]) if installed_by else None
