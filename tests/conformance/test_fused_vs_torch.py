"""The fused path against `torch.optim` over FP32 copies, within a stated bound.

`make test` takes 200 steps, `make test-exhaustive` 1,000.

Both sides round, in different places. A step adds at most, in units of 2^-24,

    2 * |weight|        the new weight is rounded once on each side
    64 * lr * reach     the update: three roundings of each moment in each step, which are
                        independent and forgotten in 1 / (1 - beta) steps, so that they add up to
                        the root of 3 * 1000 = 55; and not more than nine others

where `reach` is how large an update can get over lr: 1 where it is normalised, and the largest
gradient times 1 / (1 - momentum) for SGD. Gradients do not depend on the weights here, so what a
step adds stays and the sum over the steps is the bound.
"""

import math

import mpcore
import numpy as np
import pytest
import torch

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import FUSED
from mpcore_testing.formulas import Formula
from mpcore_testing.lengths import short_and_long

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
UNIT = 2.0**-24
LARGEST = 2.0
STEPS = short_and_long(110, 1000)  # three overflows; thirty
SCALE = mpcore.DynamicLossScale(init=2.0**9, growth_interval=40, max_scale=2.0**12)

CASES = {
    "Adam": (torch.optim.Adam, {"lr": 0.01}, 1.0),
    "Adam L2": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.05, "maximize": True}, 1.0),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, 1.0),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "eps": 1e-4}, 1.0),
    "SGD": (torch.optim.SGD, {"lr": 0.01}, LARGEST),
    "SGD momentum": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
        10 * LARGEST,
    ),
    "SGD nesterov": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True},
        11 * LARGEST,
    ),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01}, 1.0),
    "Adagrad start": (
        torch.optim.Adagrad,
        {"lr": 0.1, "initial_accumulator_value": 0.25, "maximize": True},
        1.0,
    ),
}
#: of groups after the first: own numbers, and for Adam own betas and epsilon
OTHER = {"lr": 0.003, "weight_decay": 0.02}
#: one element, a vector of less than a register, one more than a register, more than a block
SHAPES = [(1,), (7,), (17,), (3, 5), (), (65,), (4, 33)]


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [HALF, BRAIN, FULL]
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % 3]))
        for i, shape in enumerate(SHAPES)
    ]


def groups_of(params, kind):
    other = dict(OTHER)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        other |= {"betas": (0.8, 0.95), "eps": 1e-6}
    return [{"params": params[:4]}, {"params": params[4:], **other}]


def gradients(params, scale, generator):
    """Scaled gradients of at most 2, some of them missing."""
    grads = []
    for param in params:
        values = torch.randn(param.shape, generator=generator).clamp(-LARGEST, LARGEST)
        spread = 2.0 ** torch.randint(-8, 1, param.shape, generator=generator)
        missing = torch.rand((), generator=generator) < 0.1
        grads.append(None if missing else (values * spread * scale).to(param.dtype))
    return grads


def master_of(optimizer, param):
    return optimizer.state.get(param, {}).get("master", param.detach().float()).detach()


def assert_same_state(optimizer, params, plain, copies, largest):
    """Torch's names, in float32; moments have 64 roundings, as above, of terms up to `largest`."""
    for param, copy in zip(params, copies, strict=True):
        state, expected = optimizer.state[param], plain.state[copy]
        assert set(state) - {"master", "step"} == {
            key for key in expected if key != "step" and expected[key] is not None
        }
        if "step" in expected:
            assert state["step"] == expected["step"]
        for key in expected.keys() - {"step"}:
            if expected[key] is not None:
                assert state[key].dtype == FULL
                atol = 64 * UNIT * (largest + expected[key].abs())
                assert ((state[key] - expected[key]).abs() <= atol).all(), key


@pytest.mark.parametrize("engine", FUSED, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", STEPS)
def test_many_steps_stay_within_the_stated_bound(steps, name, engine):
    kind, options, reach = CASES[name]
    params = parameters(1)
    copies = [torch.nn.Parameter(p.detach().float().clone()) for p in params]
    optimizer = engine.wrap(kind(groups_of(params, kind), **options), SCALE)
    plain = kind(groups_of(copies, kind), foreach=False, **options)
    assert {path.path for path in optimizer.path} == {"fused"}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.6 + 0.4 * math.cos(t / 50))
    generator = torch.Generator().manual_seed(2)
    allowed = [torch.zeros_like(copy, dtype=torch.float64) for copy in copies]
    for step in range(steps):
        optimizer.zero_grad()
        scale = float(optimizer.scale(torch.ones(())))
        overflow = step == 0 or step % 97 == 5
        for param, copy, grad in zip(
            params, copies, gradients(params, scale, generator), strict=True
        ):
            param.grad = grad
            copy.grad = None if grad is None else grad.float() / scale
        if overflow:
            params[step % 7].grad = torch.full_like(params[step % 7], torch.inf)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, lr in zip(plain.param_groups, rates, strict=True):
            group["lr"] = lr
        optimizer.step()
        if not overflow:
            plain.step()
        schedule.step()
        for i, (bound, copy) in enumerate(zip(allowed, copies, strict=True)):
            update = 64 * rates[int(i >= 4)] * reach
            bound.add_(UNIT * (2 * copy.detach().double().abs() + update))
        if step % 20 == 0 or step == steps - 1:
            for i, (param, copy) in enumerate(zip(params, copies, strict=True)):
                master = master_of(optimizer, param)
                assert ((master - copy).double().abs() <= allowed[i]).all(), (step, i)
                assert same_bits(param.detach(), rounded(master, param.dtype))
    assert optimizer.skipped_steps == 1 + len(range(5, steps, 97))
    assert_same_state(optimizer, params, plain, copies, max(reach, LARGEST**2))


@pytest.mark.parametrize("engine", FUSED, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"lr": 0.01}, {"lr": 0.003, "betas": (0.95, 0.98), "weight_decay": 1.0, "maximize": True}],
    ids=str,
)
@pytest.mark.parametrize("steps", STEPS)
def test_many_steps_of_lion_are_those_of_the_paper(steps, options, engine):
    """A step rounds the weight twice (decay, sum), and 1 - lr * decay and lr are rounded numbers.

    A sign that hangs on the last bits may come out either way; such elements are left out.
    """
    params = [torch.nn.Parameter(p) for p in (torch.randn(300).half(), torch.randn(17, 5))]
    optimizer = engine.wrap(mpcore.optim.Lion(params, **options), SCALE)
    formulas = [Formula("Lion", options, p.detach().double().numpy()) for p in params]
    generator, farthest = torch.Generator().manual_seed(0), 0.0
    for step in range(steps):
        scale = float(optimizer.scale(torch.ones(())))
        for param, formula in zip(params, formulas, strict=True):
            values = torch.randn(param.shape, generator=generator) + 0.1
            param.grad = (values * scale).to(param.dtype)
            if step % 100:
                formula.step(param.grad.double().numpy() / scale)
            farthest = max(farthest, np.abs(formula.param).max())
        if step % 100 == 0:
            params[0].grad[0] = torch.nan
        optimizer.step()
    assert optimizer.skipped_steps == len(range(0, steps, 100))
    for param, formula in zip(params, formulas, strict=True):
        assert formula.certain.mean() > 0.8
        difference = np.abs(master_of(optimizer, param).double().numpy() - formula.param)
        allowed = steps * UNIT * (3 * farthest + options["lr"])
        assert (difference <= allowed)[formula.certain].all()
        mean = optimizer.state[param]["exp_avg"].double().numpy()
        assert np.abs(mean - formula.state["exp_avg"]).max() <= 64 * UNIT * 4
        assert set(optimizer.state[param]) - {"master"} == {"exp_avg"}


@pytest.mark.parametrize("engine", FUSED, ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("size", [1, 3, 8, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 70001])
def test_every_remainder_of_a_chunk_is_stepped_and_nothing_beyond_it(name, size, engine):
    kind, options, reach = CASES[name]
    buffer = torch.linspace(-1, 1, size + 2).half()
    param = torch.nn.Parameter(buffer[1:-1])
    ends = buffer[[0, -1]].clone()
    copy = torch.nn.Parameter(param.detach().float().clone())
    optimizer, plain = engine.wrap(kind([param], **options), SCALE), kind([copy], **options)
    for step in range(3):
        scale = float(optimizer.scale(torch.ones(())))
        grad = torch.cos(torch.arange(size) * (step + 1.0))
        param.grad = (grad * scale).half()
        copy.grad = param.grad.float() / scale
        optimizer.step()
        plain.step()
    bound = 3 * UNIT * (2 * copy.detach().abs() + 64 * options["lr"] * reach)
    assert ((master_of(optimizer, param) - copy.detach()).abs() <= bound).all()
    assert same_bits(buffer[[0, -1]], ends)
