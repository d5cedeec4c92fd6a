"""Optimizers of other packages, on the general path: masters are those of float32 twins."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import pytest
import torch

from mpcore_testing.trainer_loops import SCALING, batches, masters, network, squared_error

pytestmark = pytest.mark.trainers
STEPS, OVERFLOWS = 12, (0, 3, 7)


def make(name: str, params: Any) -> torch.optim.Optimizer:
    """An optimizer by name; skips if its package is not there."""
    if name == "Prodigy":
        prodigyopt = pytest.importorskip("prodigyopt")
        return prodigyopt.Prodigy(params, lr=1.0, weight_decay=0.1)
    schedulefree = pytest.importorskip("schedulefree")
    kind = getattr(schedulefree, name)
    return kind(params, lr=1e-2, warmup_steps=4, weight_decay=0.1)


def train(optimizer: Any) -> None:
    """Schedule-free optimizers have two modes; the others have none."""
    if hasattr(optimizer, "train"):
        optimizer.train()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["Prodigy", "AdamWScheduleFree", "SGDScheduleFree"])
def test_masters_are_those_of_float32_twins(name: str, dtype: torch.dtype) -> None:
    net = network(dtype)
    twin = copy.deepcopy(net).float()
    optimizer = mpcore.MixedPrecisionOptimizer(make(name, net.parameters()), SCALING)
    plain = make(name, twin.parameters())
    assert [path.path for path in optimizer.path] == ["general"]
    saved: Any = None
    for step, batch in enumerate(batches(STEPS, dtype)):
        train(optimizer)
        train(plain)
        scale = optimizer.loss_scale
        optimizer.backward(squared_error(net, batch))
        for param, copied in zip(net.parameters(), twin.parameters(), strict=True):
            copied.grad = param.grad.float() / scale
        if step in OVERFLOWS:
            param.grad.fill_(torch.inf)
        else:
            plain.step()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step.skipped == (step in OVERFLOWS)
        if hasattr(plain, "eval"):  # the averaged weights, as one evaluates them
            optimizer.eval()
            plain.eval()
        assert all(map(torch.equal, masters(net, optimizer), twin.parameters()))
        for param, master in zip(net.parameters(), masters(net, optimizer), strict=True):
            assert torch.equal(param, master.to(dtype))
        if step == STEPS // 2:  # goes on from a checkpoint
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            net = network(dtype, seed=9)
            optimizer = mpcore.MixedPrecisionOptimizer(make(name, net.parameters()), SCALING)
            net.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
