"""Batches of tensors on a device beside the same on the CPU, updated by kernels and by NumPy."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from mpcore_testing.kernels import assert_same_bits, random_finite
from mpcore_testing.updates import Batch, Hyper, assert_same_batches, update

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


class Twin:
    """Batches that kernels update, and the same ones that NumPy updates.

    Args:
        rule: The rule's name.
        batches: On the CPU; copied.
        device: Where the kernels work.
        placed: The batches on the device, if they must lie somewhere in particular.
        backend: What updates; None: the kernels.
    """

    def __init__(self, rule, batches, device, placed=None, backend=None):
        self.backend = backend or importlib.import_module("mpcore_kernels")
        self.rule = rule
        self.device = device
        self.expected = [batch.on("cpu") for batch in batches]
        self.actual = placed or [batch.on(device) for batch in batches]
        self.plan = self.backend.plan_update(rule, self.actual)
        self.saturated = scalar(1000, torch.int64, device)
        self.clamped = 1000

    def step(self, grads, hyper, coefficient=0.37, found_inf=0, then=None):
        """Updates both and fails unless they agree bitwise; `grads` are on the CPU."""
        self.backend.prepare_(self.plan, self.hyper_on_device(hyper))
        self.update(grads, coefficient, found_inf, then)
        self.follow(grads, hyper, coefficient, found_inf)

    def hyper_on_device(self, hyper):
        return Hyper(
            hyper.numbers, tuple(None if lr is None else lr.to(self.device) for lr in hyper.lrs)
        )

    def update(self, grads, coefficient, found_inf=0, then=None):
        """Updates what is on the device; the plan must be prepared."""
        placed = [[_copy(grad, self.device) for grad in batch] for batch in grads]
        self.backend.update_(
            self.plan,
            placed,
            scalar(coefficient, FULL, self.device),
            scalar(found_inf, torch.int32, self.device),
            self.saturated,
            then,
        )
        for one, other in zip(placed, grads, strict=True):
            for a, e in zip(one, other, strict=True):
                assert_same_bits(a, e)

    def follow(self, grads, hyper, coefficient, found_inf=0):
        """Updates what is on the host, and compares."""
        self.clamped += update(self.rule, self.expected, grads, hyper, coefficient, found_inf)
        assert_same_batches(self.actual, self.expected)
        assert self.saturated.item() == self.clamped


def _copy(tensor, device):
    return torch.empty_like(tensor, device=device).copy_(tensor)
