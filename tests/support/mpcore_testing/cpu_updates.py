"""Batches that a CPU backend updates, beside torch's fused optimizers over float32 copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mpcore.backends import cpu
from mpcore.updates import RULES, Batch, Hyper

from mpcore_testing.bits import rounded
from mpcore_testing.kernels import assert_same_bits

ADAM = {"betas": (0.85, 0.97), "eps": 1e-7}
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, **ADAM}),
    "adamw maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, **ADAM}),
    "adam l2": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "amsgrad l2": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd maximize": (torch.optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True},
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.05}),
    "adagrad maximize": (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-4, "maximize": True}),
}
NAMES = {"adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "sgd": ("momentum_buffer",)}
NAMES["adagrad"] = ("sum",)
GO, SKIP = (torch.tensor(flag, dtype=torch.int32) for flag in (0, 1))


def rule_name(optimizer_type):
    """The rule of an optimizer's type."""
    return next(name for name, rule in RULES.items() if optimizer_type in rule.optimizers)


@dataclass
class Ours:
    """What the cpu backend updates: one batch."""

    rule: str
    batch: Batch
    hyper: Hyper
    plan: Any
    saturated: torch.Tensor

    @staticmethod
    def of(rule, shapes, groups, options, dtype, scale=1.0, backend=cpu):
        """Masters from a seed; `options` are full param groups of the optimizer."""
        known = RULES[rule]
        masters = [noise(shape, i) * scale for i, shape in enumerate(shapes)]
        names = known.moments(options[0])
        numbers = tuple(known.numbers(group, group["lr"]) for group in options)
        batch = Batch(
            masters,
            None if dtype is None else [rounded(master, dtype) for master in masters],
            [[torch.zeros_like(master) for master in masters] for _ in names],
            [torch.zeros(()) for _ in masters] if known.counts_steps(names) else None,
            groups,
        )
        plan = backend.plan_update(rule, [batch])
        return Ours(rule, batch, Hyper(numbers, (None,) * len(numbers)), plan, torch.tensor(3))

    def step(self, grads, coefficient, found_inf=GO, backend=cpu):
        """Prepares and updates."""
        backend.prepare_(self.plan, self.hyper)
        backend.update_(self.plan, [grads], coefficient, found_inf, self.saturated)

    def tensors(self):
        """Everything that an update may change."""
        moments = [tensor for moment in self.batch.moments for tensor in moment]
        lists = (self.batch.masters, self.batch.weights, self.batch.steps)
        return [*moments, *(tensor for part in lists for tensor in part or ())]

    def assert_weights_rounded(self):
        """Fails unless every 16-bit weight is its master, rounded and clamped."""
        for master, weight in zip(self.batch.masters, self.batch.weights or (), strict=False):
            assert_same_bits(weight, rounded(master, weight.dtype))


def noise(shape, seed):
    """Normal numbers, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def twins(name, shapes, dtype, groups=None, lrs=(None,), scale=1.0):
    """Our batch, and torch's fused optimizer over float32 copies of it."""
    kind, options = OPTIMIZERS[name]
    groups = groups or [0] * len(shapes)
    probe = [{**options, "lr": lr or options["lr"]} for lr in lrs]
    copies = [noise(shape, i) * scale for i, shape in enumerate(shapes)]
    params = [torch.nn.Parameter(copy) for copy in copies]
    own = [[p for p, g in zip(params, groups, strict=True) if g == i] for i in range(len(lrs))]
    theirs = kind([{**o, "params": ps} for o, ps in zip(probe, own, strict=True)], fused=True)
    ours = Ours.of(rule_name(kind), shapes, groups, theirs.param_groups, dtype, scale)
    return ours, theirs, params


def assert_same_state(ours, theirs, params):
    """Fails unless masters, moments and steps are those of torch, bit for bit."""
    for i, param in enumerate(params):
        assert_same_bits(ours.batch.masters[i], param.detach())
        state = theirs.state[param]
        for name, moment in zip(NAMES[ours.rule], ours.batch.moments, strict=False):
            assert_same_bits(moment[i], state[name])
        if "step" in state:
            assert ours.batch.steps[i].item() == state["step"].item()


def run(ours, theirs, params, coefficient, dtypes, steps=3):
    """Steps both over the same gradients and compares everything after each step."""
    for step in range(steps):
        grads = [noise(p.shape, 100 * step + i) * 64 for i, p in enumerate(params)]
        grads = [g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
        before = [grad.clone() for grad in grads]
        ours.step(grads, coefficient)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float() * coefficient
        theirs.step()
        for grad, copy in zip(grads, before, strict=True):
            assert_same_bits(grad, copy)
        assert_same_state(ours, theirs, params)
        ours.assert_weights_rounded()
