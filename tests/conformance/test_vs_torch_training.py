"""Whole training loops with a real backward pass, against the same loop written out by hand.

The oracle is mixed-precision training in a dozen lines of plain PyTorch: FP32 copies, a 16-bit
model that is refreshed from them, a loss multiplied by a scale kept in a Python number.
"""

import copy

import mpcore
import pytest
import torch

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import GENERAL
from mpcore_testing.optimizers import Case
from mpcore_testing.twins import LOSS_SCALE, ScaleOracle

STEPS = 60
#: inputs so large on these steps that some scaled gradients overflow by themselves
LOUD = {0, 1, 7, 20, 21, 59}
CASES = [
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    Case("SGD", {"lr": 0.05, "momentum": 0.9, "fused": True}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    Case("Adafactor", {"lr": 0.01}),
    Case("Rprop", {"lr": 0.01, "foreach": True}),
]


class Net(torch.nn.Module):
    """Tied, frozen and unused weights; FP32, FP16 and BF16 side by side."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 6).half()
        self.tied = torch.nn.Linear(6, 6, bias=False).bfloat16()
        self.norm = torch.nn.LayerNorm(6)
        self.last = torch.nn.Linear(6, 2).half()
        self.frozen = torch.nn.Parameter(torch.ones(6).half(), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(3).half())

    def forward(self, x):
        h = torch.tanh(self.first(x.half())) * self.frozen
        h = self.tied(self.tied(h.bfloat16()))
        return self.last(self.norm(h.float()).half())


def batches(step, count=2):
    generator = torch.Generator().manual_seed(step)
    loudness = 6e4 if step in LOUD else 1.0
    for _ in range(count):
        x = torch.randn(8, 4, generator=generator)
        yield x * loudness, torch.randn(8, 2, generator=generator) * loudness


def loss_of(model, x, y):
    return torch.nn.functional.mse_loss(model(x).float(), y) * 0.5


class ByHand:
    """The loop that mpcore replaces."""

    def __init__(self, case, model):
        self.model = copy.deepcopy(model)
        self.params = list(self.model.parameters())
        self.copies = [p.detach().clone().float().requires_grad_() for p in self.params]
        self.optimizer = case.build(self.copies)
        self.scale = ScaleOracle()

    def step(self, data):
        self.model.zero_grad()
        for x, y in data:
            (loss_of(self.model, x, y) * self.scale.scale).backward()
        overflow = False
        for param, fp32 in zip(self.params, self.copies, strict=True):
            fp32.grad = None if param.grad is None else param.grad.float() / self.scale.scale
            overflow |= fp32.grad is not None and not bool(torch.isfinite(fp32.grad).all())
        if not overflow:
            self.optimizer.step()
        for param, fp32 in zip(self.params, self.copies, strict=True):
            param.data.copy_(rounded(fp32, param.dtype))
        self.scale.advance(overflow)
        return overflow


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_with_real_backward_passes_equals_the_loop_written_by_hand(case):
    torch.manual_seed(0)
    model = Net()
    by_hand = ByHand(case, model)
    optimizer = GENERAL.wrap(case.build(model.parameters()), LOSS_SCALE)
    skipped = []
    for step in range(STEPS):
        for x, y in batches(step):
            optimizer.backward(loss_of(model, x, y))
        optimizer.step()
        skipped.append(by_hand.step(batches(step)))
        assert optimizer.last_step.skipped == skipped[-1]
        assert optimizer.loss_scale == by_hand.scale.scale
        for param, fp32, hand in zip(
            model.parameters(), by_hand.copies, by_hand.params, strict=True
        ):
            master = (
                optimizer.state[param].get("master", param) if param in optimizer.state else param
            )
            assert same_bits(param.detach(), hand.detach())
            assert same_bits(master.detach().float(), fp32.detach())
            if param.dtype != torch.float32 and param.grad is not None:
                assert same_bits(param.grad, hand.grad)  # still scaled, not touched
        optimizer.zero_grad()
    assert 2 <= sum(skipped) <= STEPS // 3
    assert skipped[0]


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_accumulate_overflow_only_in_their_sum(engine, fused):
    """Two finite float16 gradients of 40000 add up to infinity: the step must be skipped."""
    weight = torch.nn.Parameter(torch.ones(2).half())
    optimizer = engine.wrap(
        torch.optim.AdamW([weight], lr=0.1, fused=fused), mpcore.StaticLossScale(1.0)
    )
    for _ in range(2):
        optimizer.backward((weight.float() * 40000.0).sum())
    optimizer.step()
    assert optimizer.last_step.skipped
    assert weight.tolist() == [1.0, 1.0]
