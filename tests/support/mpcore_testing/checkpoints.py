"""A model of every dtype, its optimizers and bitwise pictures of both, for tests of state_dicts."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=4)
INNERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD without state": lambda p: torch.optim.SGD(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=torch.tensor(0.001), momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
}


def applied(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` without a matrix product, which is slow in 16 bits on some CPUs."""
    return (x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias


class Pair(nn.Module):
    """A layer of each dtype; the last one, float64 by default, is one that not all engines take."""

    def __init__(self, last: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.low = nn.Linear(3, 4).half()
        self.brain = nn.Linear(4, 3).bfloat16()
        self.single = nn.Linear(3, 2)
        self.last = nn.Linear(2, 1).to(last)
        self.frozen = nn.Parameter(torch.ones(2).half(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = applied(self.brain, applied(self.low, x.half()).bfloat16())
        return applied(self.last, self.single(hidden.float()).to(self.last.weight.dtype))


def make(
    engine: Engine, name: str = "AdamW", scale: Any = SCALE, seed: int = 0
) -> tuple[Pair, mpcore.MixedPrecisionOptimizer]:
    torch.manual_seed(seed)
    model = Pair(engine.dtypes([torch.float64, torch.float32])[0])
    return model, engine.wrap(INNERS[name](model.parameters()), scale)


def train(model: nn.Module, optimizer: Any, first: int, last: int, bad: Any = (5,)) -> None:
    for seed in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.backward(model(x).square().mean() * (torch.inf if seed in bad else 1.0))
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()


def patterns(value: Any) -> Any:
    """Any nested value with every tensor as its dtype, shape and bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, dict):
        return {key: patterns(item) for key, item in value.items()}
    return [patterns(item) for item in value] if isinstance(value, (list, tuple)) else value


def contents(model: nn.Module, optimizer: Any) -> Any:
    """Weights, both views of the state, groups and scale, by the parameters' names."""
    params = dict(model.named_parameters())
    outer = {name: patterns(optimizer.state.get(p)) for name, p in params.items()}
    inner = {
        name: patterns(optimizer.inner.state.get(optimizer.state.get(p, {}).get("master", p)))
        for name, p in params.items()
    }
    saved = optimizer.state_dict()
    return patterns(model.state_dict()), outer, inner, patterns(saved), len(optimizer.inner.state)
