"""A mixed optimizer and its oracles: twins whose groups are all fused, or all general."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.bits import bits

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=3)
SHAPES = ((4, 3), (5,), ())
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BUILD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
}
FUSED, GENERAL = 0, 1  # numbers of the groups of a mixed optimizer


def weights(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in SHAPES
        for dtype in DTYPES
    ]


class Twins:
    """A mixed optimizer, one that is all fused, and one that is all general."""

    def __init__(self, name: str, backend: str = "compiled", scale: Any = SCALE, **options: Any):
        def make(path: str, *foreach: bool | None) -> mpcore.MixedPrecisionOptimizer:
            groups = [
                {"params": weights(seed), **({} if asked is None else {"foreach": asked})}
                for seed, asked in enumerate(foreach)
            ]
            inner = BUILD[name](groups)
            return mpcore.MixedPrecisionOptimizer(
                inner, scale, backend=backend, path=path, **options
            )

        self.mixed = make("auto", None, True)
        self.alone = (make("fused", None, None), make("general", None, True))
        self.all = (self.mixed, *self.alone)
        assert [path.path for path in self.mixed.path] == ["fused", "general"]

    def each(self, act: Callable[[mpcore.MixedPrecisionOptimizer], object]) -> list[Any]:
        return [act(optimizer) for optimizer in self.all]

    def pass_(self, seed: int, bad: int | None = None, without: tuple[int, ...] = ()) -> None:
        """One scaled backward pass; gradients of group `bad` overflow."""
        for optimizer in self.all:
            backward(optimizer, seed, bad, without)

    def check(self) -> None:
        """Everything of each group is that of the twin on its path."""
        for number, twin in enumerate(self.alone):
            pairs = zip(params(self.mixed, number), params(twin, number), strict=True)
            for place, (mine, theirs) in enumerate(pairs):
                where = f"group {number}, parameter {place}"
                assert torch.equal(bits(mine), bits(theirs)), where
                own, other = self.mixed.state[mine], twin.state[theirs]
                assert {*own} == {*other}, where
                for key, value in own.items():
                    assert torch.equal(bits(value), bits(other[key])), (where, key)
        assert len({optimizer.loss_scale for optimizer in self.all}) == 1
        assert len({optimizer.steps for optimizer in self.all}) == 1
        assert len({optimizer.skipped_steps for optimizer in self.all}) == 1
        assert self.mixed.check_masters() == []


def params(optimizer: torch.optim.Optimizer, *numbers: int) -> list[nn.Parameter]:
    groups = optimizer.param_groups
    chosen = [groups[number] for number in numbers] if numbers else groups
    return [param for group in chosen for param in group["params"]]


def loss_of(optimizer: torch.optim.Optimizer, seed: int, without: tuple[int, ...] = ()) -> Tensor:
    """A loss whose gradients are random numbers, of all groups but some."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for number in range(len(optimizer.param_groups)):
        for param in params(optimizer, number):
            factor = torch.randn(param.shape, generator=generator)
            if number not in without:
                terms.append((param.float() * factor).sum())
    return torch.stack(terms).sum()


def backward(
    optimizer: mpcore.MixedPrecisionOptimizer,
    seed: int,
    bad: int | None = None,
    without: tuple[int, ...] = (),
) -> None:
    optimizer.backward(loss_of(optimizer, seed, without))
    if bad is not None:
        grad = params(optimizer, bad)[0].grad
        assert grad is not None
        grad.view(-1)[0] = torch.inf
