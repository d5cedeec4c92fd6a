"""The fused path over many steps, bit for bit what an oracle of each engine computes.

`make test` takes 200 steps, `make test-exhaustive` 1,000.

`reference` and `compiled` are judged by NumPy's float32, one operation after the other, `cpu` by
`torch.optim` with `fused=True` over FP32 copies. Everything happens that happens in training: the
first step overflows, later ones as well, gradients are missing now and then, two param groups have
numbers of their own, a schedule moves the learning rate, and the loss scale grows and backs off.
"""

import math

import mpcore
import pytest
import torch

from mpcore_testing.batches import Batch, Hyper
from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import Engine
from mpcore_testing.lengths import short_and_long
from mpcore_testing.updates import update

STEPS = short_and_long(110, 1000)  # three overflows; thirty
SCALE = mpcore.DynamicLossScale(init=2.0**9, growth_interval=25, max_scale=2.0**12)
SHAPES = [(1,), (7,), (17,), (3, 5), (), (65,), (4, 33)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BETAS, OTHER_BETAS = (0.9, 0.999), (0.8, 0.95)


def adam(group):
    decoupled = float(group["decoupled_weight_decay"])
    options = (group["eps"], group["weight_decay"], decoupled, float(group["maximize"]))
    return (group["lr"], *group["betas"], *options)


def sgd(group):
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return tuple(float(group[name]) for name in names)


def adagrad(group):
    names = ("lr", "lr_decay", "eps", "weight_decay", "maximize")
    return tuple(float(group[name]) for name in names)


def lion(group):
    return (group["lr"], *group["betas"], group["weight_decay"], float(group["maximize"]))


#: class, options, what a second group has of its own; rule, its numbers, moments and their start
CASES = {
    "Adam L2": (
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.05, "maximize": True},
        {"betas": OTHER_BETAS, "eps": 1e-6},
        ("adam", adam, {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
    ),
    "AdamW": (
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1},
        {"betas": OTHER_BETAS, "lr": 0.003},
        ("adam", adam, {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
    ),
    "AdamW amsgrad": (
        torch.optim.AdamW,
        {"lr": 0.01, "amsgrad": True, "eps": 1e-4},
        {"lr": 0.003},
        ("adam", adam, {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}),
    ),
    "SGD": (torch.optim.SGD, {"lr": 0.01}, {"weight_decay": 0.1}, ("sgd", sgd, {})),
    "SGD momentum": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
        {"momentum": 0.5},
        ("sgd", sgd, {"momentum_buffer": 0.0}),
    ),
    "SGD nesterov": (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True},
        {"lr": 0.1},
        ("sgd", sgd, {"momentum_buffer": 0.0}),
    ),
    "Adagrad": (
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.25},
        {"weight_decay": 0.01},
        ("adagrad", adagrad, {"sum": 0.25}),
    ),
    "Lion": (
        mpcore.optim.Lion,
        {"lr": 0.01, "weight_decay": 0.1},
        {"lr": 0.003, "betas": BETAS},
        ("lion", lion, {"exp_avg": 0.0}),
    ),
}


class Numpy:
    """What NumPy makes of the same gradients."""

    def __init__(self, params, rule, numbers, moments):
        self.rule, self.numbers, self.names = rule, numbers, list(moments)
        self.each = []
        for i, param in enumerate(params):
            master = param.detach().float().clone()
            half = param.dtype != torch.float32
            self.each.append(
                Batch(
                    masters=[master],
                    weights=[param.detach().clone()] if half else None,
                    moments=[[torch.full_like(master, first)] for first in moments.values()],
                    steps=[torch.zeros(())],
                    groups=[int(i >= 4)],
                )
            )

    def step(self, groups, grads, scale):
        hyper = Hyper.of(*map(self.numbers, groups))
        present = [(b, [g]) for b, g in zip(self.each, grads, strict=True) if g is not None]
        update(self.rule, [b for b, _ in present], [g for _, g in present], hyper, 1 / scale)

    def masters(self):
        return [batch.masters[0] for batch in self.each]

    def moments(self):
        return [
            {name: moment[0] for name, moment in zip(self.names, batch.moments, strict=True)}
            for batch in self.each
        ]


class Torch:
    """What `torch.optim` makes of them, in one fused kernel for each dtype and group."""

    def __init__(self, params, kind, options, other, moments):
        self.copies = [torch.nn.Parameter(p.detach().float().clone()) for p in params]
        self.names = list(moments)
        self.inner = kind(groups_of(self.copies, other), fused=True, **options)

    def step(self, groups, grads, scale):
        for own, group in zip(self.inner.param_groups, groups, strict=True):
            own["lr"] = group["lr"]
        for copy, grad in zip(self.copies, grads, strict=True):
            copy.grad = None if grad is None else grad.float() / scale
        self.inner.step()

    def masters(self):
        return [copy.detach() for copy in self.copies]

    def moments(self):
        states = [self.inner.state.get(copy, {}) for copy in self.copies]
        return [{name: state[name] for name in self.names if name in state} for state in states]


def groups_of(params, other):
    return [{"params": params[:4]}, {"params": params[4:], **other}]


def gradients(params, scale, generator, share_missing):
    """Scaled ones that do not overflow, some of them missing."""
    grads = []
    for param in params:
        values = torch.randn(param.shape, generator=generator).clamp(-2, 2)
        spread = 2.0 ** torch.randint(-8, 1, param.shape, generator=generator)
        missing = torch.rand((), generator=generator) < share_missing
        grads.append(None if missing else (values * spread * scale).to(param.dtype))
    return grads


def cases():
    for name, (kind, _, _, _) in CASES.items():
        for backend in ("reference", "compiled", "cpu"):
            if backend != "cpu" or kind is not mpcore.optim.Lion:  # torch has none
                yield pytest.param(name, backend, id=f"{name}-{backend}")


@pytest.mark.parametrize(("name", "backend"), list(cases()))
@pytest.mark.parametrize("steps", STEPS)
def test_many_steps_have_the_bits_of_the_oracle(steps, name, backend):
    kind, options, other, (rule, numbers, moments) = CASES[name]
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [torch.nn.Parameter(v.to(DTYPES[i % 3])) for i, v in enumerate(values)]
    oracle = Numpy(params, rule, numbers, moments)
    if backend == "cpu":
        oracle = Torch(params, kind, options, other, moments)
    optimizer = Engine(backend, "fused").wrap(kind(groups_of(params, other), **options), SCALE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.6 + 0.4 * math.cos(t / 50))
    scales = set()
    for step in range(steps):
        optimizer.zero_grad()
        scale = float(optimizer.scale(torch.ones(())))
        scales.add(scale)
        # torch's fused SGD fails if the first gradient of some comes later than that of others
        share_missing = 0.0 if backend == "cpu" and step < 2 else 0.1
        grads = gradients(params, scale, generator, share_missing)
        overflows = step == 0 or step % 97 == 5
        if not overflows:
            oracle.step(optimizer.param_groups, grads, scale)
        else:
            grads[step % 7] = torch.full_like(params[step % 7], torch.inf).detach()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        schedule.step()
        if step < 10 or step % 50 == 0 or step == steps - 1:
            assert_same(optimizer, params, oracle, moments)
    assert optimizer.skipped_steps == 1 + len(range(5, steps, 97))
    assert len(scales) > 3


def assert_same(optimizer, params, oracle, first):
    for param, master, moments in zip(params, oracle.masters(), oracle.moments(), strict=True):
        state = optimizer.state[param]
        assert same_bits(state.get("master", param).detach(), master)
        assert same_bits(param.detach(), rounded(master, param.dtype))
        for name, expected in moments.items():
            # a parameter that never had a gradient need not have a state
            start = torch.full_like(master, first[name])
            assert same_bits(state.get(name, start), expected), name
