"""Optimizers that evaluate a closure: LBFGS over 16-bit weights against LBFGS over FP32 copies.

The oracle's closure rounds the copies to 16 bits, evaluates the same 16-bit function and unscales.
"""

import pytest
import torch

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import GENERAL
from mpcore_testing.optimizers import Case, cases
from mpcore_testing.twins import Twins

INF, NAN = float("inf"), float("nan")
STEPS = 100
#: (step, evaluation in that step) -> factor of the loss
OVERFLOWS = {(0, 0): INF, (1, 1): NAN, (12, 2): -INF, (13, 0): NAN, (60, 1): INF, (99, 2): NAN}


def parameters(generator):
    shapes = [((4, 3), torch.float16), ((3,), torch.bfloat16), ((3, 2), torch.float32)]
    params = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes]
    params.append(torch.ones(2).half())  # takes no part
    return [torch.nn.Parameter(p) for p in params]


def loss_of(params, step):
    """A 16-bit function of the parameters: what reaches FP32 arithmetic are their 16 bits.

    The data hardly change from step to step, or curvature estimates would throw LBFGS off. A line
    search may reach far all the same, and where it goes depends on the last bits of the CPU's
    matrix products. So every derivative is bounded, by 4: only what is injected overflows.
    """
    fixed = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=fixed), torch.randn(64, 2, generator=fixed)
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
    hidden = torch.tanh(x @ params[0].float() + params[1].float())
    apart = hidden @ torch.tanh(params[2]) - y - 0.1 * noise
    penalty = sum((1 + p.float().square()).sqrt().sum() for p in params[:3])
    return (1 + apart.square()).sqrt().mean() + 0.05 * penalty


def oracle_step(twins, step):
    """One step of the plain optimizer, whose closure does by hand what the wrapper does."""

    def closure():
        weights = [rounded(c, p.dtype) for c, p in zip(twins.copies, twins.params, strict=True)]
        weights = [w.clone().requires_grad_() for w in weights]
        loss = loss_of(weights, step)
        (loss * twins.scale.scale).backward()
        for fp32, weight in zip(twins.copies, weights, strict=True):
            grad = weight.grad
            fp32.grad = None if grad is None else (grad.double() / twins.scale.scale).float()
        return loss

    return twins.plain.step(closure)


class Evaluations:
    """A user's closure; it overflows where `OVERFLOWS` says."""

    def __init__(self, twins, step):
        self.twins, self.step, self.count = twins, step, 0
        self.spoilt = False

    def __call__(self):
        assert torch.is_grad_enabled()
        held = [p for group in self.twins.wrapped.param_groups for p in group["params"]]
        assert all(a is b for a, b in zip(held, self.twins.params, strict=True))
        self.twins.wrapped.zero_grad()
        loss = loss_of(self.twins.params, self.step)
        factor = OVERFLOWS.get((self.step, self.count), 1.0)
        self.spoilt |= factor != 1.0
        self.count += 1
        self.twins.wrapped.backward(loss * factor)
        return loss


@pytest.mark.parametrize("case", cases(["LBFGS"]), ids=str)
def test_lbfgs_masters_are_those_of_lbfgs_over_rounded_fp32_copies(case):
    twins = Twins.of(case, [parameters(torch.Generator().manual_seed(3))])
    counts, skipped = [], []
    for step in range(STEPS):
        closure = Evaluations(twins, step)
        result = twins.wrapped.step(closure)
        if not closure.spoilt:
            assert same_bits(result.detach(), oracle_step(twins, step).detach())
        twins.scale.advance(closure.spoilt)
        assert twins.differences() == [], f"after step {step}"
        assert twins.wrapped.last_step.skipped == closure.spoilt
        assert twins.wrapped.loss_scale == twins.scale.scale
        counts.append(closure.count)
        if closure.spoilt:  # the evaluation that overflowed was the last of its step
            skipped.append((step, closure.count - 1))
    assert set(skipped) <= OVERFLOWS.keys()
    # how often a step evaluates depends on the CPU's last bits, so one or the other may be missed
    assert len([at for at in skipped if at[1] > 0]) >= 2
    assert twins.wrapped.skipped_steps == len(skipped)
    assert twins.wrapped.steps == STEPS
    assert max(counts) > 2
    start = parameters(torch.Generator().manual_seed(3))
    moved = [not torch.equal(p, old) for p, old in zip(twins.params, start, strict=True)]
    assert moved == [True, True, True, False]  # the last takes no part


@pytest.mark.parametrize(
    "case",
    [
        Case("AdamW", {"lr": 0.02}),
        Case("AdamW", {"lr": 0.02, "fused": True}),
        Case("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
        Case("Rprop", {"lr": 0.02}),
    ],
    ids=str,
)
def test_closure_with_a_first_order_optimizer_equals_the_plain_one(case):
    twins = Twins.of(case, [parameters(torch.Generator().manual_seed(4))])
    skipped = {step for step, evaluation in OVERFLOWS if evaluation == 0}
    for step in range(20):
        closure = Evaluations(twins, step)
        twins.wrapped.step(closure)
        assert closure.count == 1
        if step not in skipped:
            oracle_step(twins, step)
        twins.scale.advance(step in skipped)
        assert twins.differences() == [], f"after step {step}"
    assert twins.wrapped.skipped_steps == len(skipped)


class UserError(Exception):
    pass


@pytest.mark.parametrize("case", cases(["LBFGS"]), ids=str)
@pytest.mark.parametrize("evaluation", [0, 2])
def test_closure_that_raises_leaves_everything_as_it_was(case, evaluation):
    twins = Twins.of(case, [parameters(torch.Generator().manual_seed(5))])

    class Raising(Evaluations):
        def __call__(self):
            if self.count == evaluation and self.step == 3:
                raise UserError
            return super().__call__()

    for step in (2, 3, 4):
        if step == 3:
            with pytest.raises(UserError):
                twins.wrapped.step(Raising(twins, step))
        else:
            twins.wrapped.step(Evaluations(twins, step))
            oracle_step(twins, step)
        assert twins.differences() == [], f"after step {step}"
    assert (twins.wrapped.steps, twins.wrapped.skipped_steps) == (2, 0)


def test_overflow_in_a_closure_restores_the_options_that_the_inner_optimizer_changed():
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] *= 0.5
            return super().step(closure)

    weight = torch.nn.Parameter(torch.ones(3).half())
    optimizer = GENERAL.wrap(Decaying([weight], lr=0.5))

    def closure():
        optimizer.zero_grad()
        loss = weight.float().sum()
        optimizer.backward(loss * INF)
        return loss

    optimizer.step(closure)
    assert optimizer.last_step.skipped
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert weight.tolist() == [1.0, 1.0, 1.0]
