"""Two wrapped optimizers over equal weights, which keep what they know differently in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine

SCALE = mpcore.DynamicLossScale(init=2.0**9, growth_interval=4, max_scale=2.0**12)
SHAPES = [(3, 5), (7,), (), (4, 33), (65,)]

Build = Callable[[Any], torch.optim.Optimizer]

BUILDS: dict[str, Build] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
    "AMSGrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True, maximize=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "Lion": lambda params: mpcore.optim.Lion(params, lr=1e-4, weight_decay=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Returns weights of every layout: one is transposed, one is float32."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    params[3] = nn.Parameter(params[3].detach().t())
    params[4] = nn.Parameter(params[4].detach().float())
    return params


@dataclass
class Stored:
    """An optimizer and what it steps."""

    optimizer: mpcore.MixedPrecisionOptimizer
    params: list[nn.Parameter]

    def step(self, seed: int, *, overflow: bool = False, **options: Any) -> None:
        """Takes a step with gradients of a seed; see `give`."""
        self.give(seed, overflow=overflow)
        if "max_norm" in options:
            self.optimizer.clip_grad_norm_(options["max_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def give(self, seed: int, *, overflow: bool = False, scaler: Any = None) -> None:
        """Leaves gradients of a scaled loss in `p.grad`: the same for every store.

        Args:
            seed: Of their values.
            overflow: Whether one is infinite.
            scaler: What scales the loss; None: the optimizer.
        """
        scale = float((self.optimizer if scaler is None else scaler).scale(torch.ones(())))
        generator = torch.Generator().manual_seed(seed)
        for param in self.params:
            values = torch.randn(param.shape, generator=generator).clamp(-2, 2)
            spread = 2.0 ** torch.randint(-8, 1, param.shape, generator=generator)
            param.grad = torch.empty_like(param).copy_(values * spread * scale)
        if overflow:
            self.params[0].grad[0, 0] = torch.inf  # type: ignore[index]

    def states(self) -> list[dict[str, Any]]:
        """Returns masters and moments in float32."""
        return [self.optimizer.float32_state(param) for param in self.params]

    def bits(self) -> list[Any]:
        """Returns copies of weights, and of the state as it lies."""
        weights = [param.detach().clone() for param in self.params]
        lying = [copy.deepcopy(self.optimizer.state.get(param, {})) for param in self.params]
        return [weights, lying]


def stored(engine: Engine, build: Build, dtype: torch.dtype, **options: Any) -> Stored:
    """Returns an optimizer over `parameters`; options are those of `Engine.wrap`."""
    params = parameters(dtype)
    return Stored(engine.wrap(build(params), options.pop("loss_scale", SCALE), **options), params)


def assert_same_states(ours: Stored, theirs: Stored) -> None:
    """Fails unless masters and moments have the same bits."""
    assert same_bits(ours.states(), theirs.states())


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Returns the bytes of the memory behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
