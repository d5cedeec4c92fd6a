"""A training whose weights others write to, and ways to write to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import mpcore.migration
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
ADOPTED = "elements of .* were written to by others"
INNERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


class Training:
    """A float16 layer, a bfloat16 one, and a float32 norm; masters have digits of their own."""

    def __init__(self, engine: Engine, rule: str = "adopt", inner: str = "AdamW") -> None:
        torch.manual_seed(0)
        self.low, self.brain, self.norm = nn.Linear(4, 3), nn.Linear(3, 2), nn.LayerNorm(3)
        self.model = nn.ModuleDict({"low": self.low, "brain": self.brain, "norm": self.norm})
        optimizer = INNERS[inner](self.model.named_parameters())
        self.optimizer = engine.wrap(optimizer, mpcore.DynamicLossScale(2.0**6), rule)
        mpcore.cast_model(self.low, HALF, None)
        originals = [(p, p.detach().float() * (1 + 2.0**-14)) for p in self.low.parameters()]
        mpcore.cast_model(self.brain, BRAIN, None)
        originals += [(p, p.detach().float() * (1 + 2.0**-11)) for p in self.brain.parameters()]
        self.optimizer.adopt_masters(originals)

    def loss(self, seed: int, factor: float = 1.0) -> Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        hidden = (x.half().unsqueeze(-2) * self.low.weight).sum(-1) + self.low.bias
        hidden = self.norm(hidden.float()).bfloat16()
        out = (hidden.unsqueeze(-2) * self.brain.weight).sum(-1) + self.brain.bias
        return out.float().square().mean() * factor

    def backward(self, seed: int, factor: float = 1.0) -> None:
        self.optimizer.backward(self.loss(seed, factor))

    def step(self, *seeds: int) -> None:
        for seed in seeds:
            self.backward(seed)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def halves(self) -> list[Tensor]:
        return [*self.low.parameters(), *self.brain.parameters()]

    def masters(self) -> list[Tensor]:
        return [self.optimizer.state[param]["master"] for param in self.halves()]


def expected_masters(training: Training) -> list[Tensor]:
    """What masters have to be once the weights of now are adopted; no code of mpcore."""
    found = []
    for param, master in zip(training.halves(), training.masters(), strict=True):
        weight = param.detach()
        same = master.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
        found.append(torch.where(same, master, weight.float()).detach().clone())
    return found


def equal_after_adoption(training: Training, *, factor: float = 0.0) -> None:
    """A step whose gradients overflow changes nothing, so that what was adopted can be seen."""
    expected = expected_masters(training)
    weights = [param.detach().clone() for param in training.halves()]
    training.optimizer.backward(training.loss(9, torch.inf))
    with pytest.warns(UserWarning, match=ADOPTED):
        training.optimizer.step()
    assert training.optimizer.last_step is not None
    assert training.optimizer.last_step.skipped
    assert same_bits([m.detach() for m in training.masters()], expected)
    assert same_bits([param.detach() for param in training.halves()], weights)
    training.optimizer.zero_grad()


@torch.no_grad()
def one_row(training: Training) -> None:
    training.low.weight[1].copy_(torch.randn(4))


@torch.no_grad()
def whole_model(training: Training) -> None:
    other = {name: torch.randn_like(value) for name, value in training.model.state_dict().items()}
    training.model.load_state_dict(other)


@torch.no_grad()
def some_clipped(training: Training) -> None:
    for param in training.halves():
        param.clamp_(-0.2, 0.2)


@torch.no_grad()
def pruned(training: Training) -> None:
    for param in training.halves():
        param.mul_(torch.rand(param.shape) < 0.5)


EDITS: dict[str, Callable[[Training], None]] = {
    f.__name__: f for f in (one_row, whole_model, some_clipped, pruned)
}
