"""Batches of tensors for fused updates, options for every rule, and a loss scale beside them.

Needs torch alone: the run on a GPU uses it where neither pytest nor NumPy need be.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpcore_testing.kernels import random_finite

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
#: dtypes of gradient and weight
COMBINATIONS = [(HALF, HALF), (BRAIN, BRAIN), (FULL, None), (FULL, HALF), (FULL, BRAIN)]
#: for each rule and number of moments, hyper-parameters that use every option of it once
OPTIONS = [
    ("adam", 2, (1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0, 0.0)),
    ("adam", 2, (1e-2, 0.8, 0.99, 1e-3, 0.3, 0.0, 1.0)),
    ("adam", 3, (3e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 0.0)),
    ("sgd", 0, (0.1, 0.0, 0.0, 0.01, 0.0, 1.0)),
    ("sgd", 1, (0.1, 0.9, 0.3, 0.01, 0.0, 0.0)),
    ("sgd", 1, (0.1, 0.9, 0.0, 0.02, 1.0, 1.0)),
    ("adagrad", 1, (0.1, 0.03, 1e-10, 0.01, 0.0)),
    ("lion", 1, (1e-3, 0.9, 0.99, 0.1, 1.0)),
]
#: one of them for each rule and number of moments
KINDS = [OPTIONS[i] for i in (0, 2, 3, 4, 6, 7)]


@dataclass
class Batch:
    """Tensors of one combination of dtypes; also what `plan_update` takes."""

    masters: list[Tensor]
    weights: list[Tensor] | None
    moments: list[list[Tensor]]
    steps: list[Tensor] | None
    groups: list[int]
    store: str = "float32"
    moment_stores: tuple = ()
    scales: tuple = ()
    keys: list[int] | None = None
    offsets: list[int] | None = None

    def everything(self):
        """All tensors."""
        moments = [tensor for moment in self.moments for tensor in moment]
        scales = [tensor for scales in self.scales for tensor in scales or ()]
        return [*self.masters, *(self.weights or ()), *moments, *scales, *(self.steps or ())]

    def on(self, device):
        """A copy on a device, of the same strides."""
        return copy.deepcopy(self) if device is None else _mapped(self, lambda t: _copy(t, device))


@dataclass
class Hyper:
    """Hyper-parameters, as `prepare_` takes them."""

    numbers: tuple
    lrs: tuple

    @staticmethod
    def of(*rows):
        """From rows of numbers alone."""
        return Hyper(tuple(rows), (None,) * len(rows))


def _copy(tensor, device):
    return torch.empty_like(tensor, device=device).copy_(tensor)


def _mapped(batch, change):
    def each(tensors):
        return None if tensors is None else [change(tensor) for tensor in tensors]

    return replace(
        batch,
        masters=each(batch.masters),
        weights=each(batch.weights),
        moments=[each(moment) for moment in batch.moments],
        steps=each(batch.steps),
        groups=list(batch.groups),
        scales=tuple(map(each, batch.scales)),
    )


def make_batch(moments, weight, sizes, *, steps=3.0, groups=None, make=random_finite, seed=0):
    """A batch on the CPU of tensors of random values; `steps` is the count of each, or None."""
    masters = [make(n, FULL, seed + i) for i, n in enumerate(sizes)]
    return Batch(
        masters=masters,
        weights=None if weight is None else [master.to(weight) for master in masters],
        # what optimizers store there is mostly not negative
        moments=[
            [make(n, FULL, seed + 100 * (k + 1) + i).abs() for i, n in enumerate(sizes)]
            for k in range(moments)
        ],
        steps=None if steps is None else [torch.tensor(steps) for _ in sizes],
        groups=groups or [0] * len(sizes),
    )


def make_grads(batch, dtype, seed, make=random_finite):
    """A gradient for each tensor of a batch, of its shape and strides."""
    return [
        torch.empty_like(master, dtype=dtype).copy_(
            make(master.numel(), dtype, seed + i).view(master.shape)
        )
        for i, master in enumerate(batch.masters)
    ]


def scalar(value, dtype, device):
    """A 0-d tensor."""
    return torch.tensor(value, dtype=dtype, device=device)


@dataclass
class Move:
    """A loss scale that backs off and grows; its attributes are what `then` needs."""

    scale: torch.Tensor
    growth_tracker: torch.Tensor
    overflows_left: torch.Tensor
    counters: torch.Tensor
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2
    min_scale: float = 1.0
    max_scale: float = 2.0**20
    hysteresis: int = 1
    refill: int = 0
    tolerance: tuple = (0, 1)

    @staticmethod
    def on(device, scale=1024.0):
        """A fresh one."""
        single = [scalar(n, torch.int32, device) for n in (0, 1)]
        counters = torch.zeros(6, dtype=torch.int64, device=device)
        return Move(scalar(scale, FULL, device), *single, counters)

    def tensors(self):
        """The state."""
        return [self.scale, self.growth_tracker, self.overflows_left, self.counters]

    def values(self):
        """The state, on the host."""
        return [value for t in self.tensors() for value in t.flatten().tolist()]
