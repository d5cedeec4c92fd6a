"""Batches of tensors on a device beside the same on the CPU, updated by kernels and by NumPy."""

from __future__ import annotations

import importlib

import torch

from mpcore_testing.adoptions import adopt
from mpcore_testing.batches import FULL, Hyper, scalar
from mpcore_testing.kernels import assert_same_bits
from mpcore_testing.updates import assert_same_batches, update


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

    def step(self, grads, hyper, coefficient=0.37, found_inf=0, then=None, edits=None):
        """Updates both and fails unless they agree bitwise; `grads` are on the CPU."""
        self.backend.prepare_(self.plan, self.hyper_on_device(hyper))
        self.update(grads, coefficient, found_inf, then, edits)
        self.follow(grads, hyper, coefficient, found_inf)

    def step_after_edits(self, grads, hyper, found_inf=0):
        """The same if others may have written to weights; returns what has to be counted of it."""
        counts = adopt(self.expected)
        before = 2**40 + torch.arange(counts.numel()).view(counts.shape)
        edits = before.clone().to(self.device)
        self.step(grads, hyper, found_inf=found_inf, edits=edits)
        assert (edits.cpu() - before).tolist() == counts.tolist()
        return counts

    def hyper_on_device(self, hyper):
        return Hyper(
            hyper.numbers, tuple(None if lr is None else lr.to(self.device) for lr in hyper.lrs)
        )

    def update(self, grads, coefficient, found_inf=0, then=None, edits=None):
        """Updates what is on the device; the plan must be prepared."""
        placed = [[_copy(grad, self.device) for grad in batch] for batch in grads]
        self.backend.update_(
            self.plan,
            placed,
            scalar(coefficient, FULL, self.device),
            scalar(found_inf, torch.int32, self.device),
            self.saturated,
            then,
            edits,
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


def normal(count, dtype, seed):
    """Random numbers of the size of weights."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Stepping:
    """One batch in one store, stepped by one backend."""

    def __init__(self, backend, rule, batch):
        self.backend, self.batch = backend, batch
        self.plan = backend.plan_update(rule, [batch])
        self.saturated = scalar(0, torch.int64, "cpu")

    def step(self, grads, numbers, found_inf=0, coefficient=0.37):
        self.backend.prepare_(self.plan, Hyper.of(numbers))
        flag = scalar(found_inf, torch.int32, "cpu")
        factor = scalar(coefficient, FULL, "cpu")
        self.backend.update_(self.plan, [grads], factor, flag, self.saturated)
