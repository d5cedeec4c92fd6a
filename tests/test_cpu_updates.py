"""Fused updates on a CPU: bitwise torch's fused optimizers, or the reference backend."""

import mpcore
import pytest
import torch
from mpcore.backends import compiled, cpu, reference
from mpcore.backends._blocks import CHUNK
from mpcore.optim import Lion
from mpcore.updates import Batch, Hyper, rule_of

from mpcore_testing.bits import rounded, same_bits

SIZES = [1, 7, 64, 4099, CHUNK - 1, CHUNK, CHUNK + 65, 3]
BUILD = {
    "AdamW": lambda g: torch.optim.AdamW(g, lr=0.01, fused=True),
    "Adam": lambda g: torch.optim.Adam(
        g, lr=0.01, weight_decay=0.1, amsgrad=True, maximize=True, fused=True
    ),
    "SGD": lambda g: torch.optim.SGD(g, lr=0.1, weight_decay=0.01, fused=True),
    "momentum": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, dampening=0.3, fused=True),
    "nesterov": lambda g: torch.optim.SGD(
        g, lr=0.1, momentum=0.9, nesterov=True, maximize=True, fused=True
    ),
    "Adagrad": lambda g: torch.optim.Adagrad(g, lr=0.1, lr_decay=0.1, weight_decay=0.1, fused=True),
}
# torch.compile itself warns of what it deprecates
COMPILES = pytest.mark.filterwarnings("ignore")
ZERO = torch.tensor(0, dtype=torch.int32)


class Updates:
    """A backend's update over copies of the parameters of a torch optimizer with two groups."""

    def __init__(self, backend, optimizer, dtype):
        self.backend, self.optimizer = backend, optimizer
        rule = rule_of(optimizer)
        groups = optimizer.param_groups
        masters = [p.detach().clone() for group in groups for p in group["params"]]
        names = rule.moments(groups[0])
        counts = rule.counts_steps(names)
        self.batch = Batch(
            masters,
            None if dtype is None else [m.to(dtype) for m in masters],
            [[torch.zeros_like(m) for m in masters] for _ in names],
            [torch.zeros(()) for _ in masters] if counts else None,
            [i for i, group in enumerate(groups) for _ in group["params"]],
        )
        self.plan = backend.plan_update(rule.name, [self.batch])
        self.rule = rule
        self.saturated = torch.zeros((), dtype=torch.int64)

    def step(self, grads, coefficient, found_inf=ZERO):
        groups = self.optimizer.param_groups
        rows = tuple(self.rule.numbers(group, group["lr"]) for group in groups)
        self.backend.prepare_(self.plan, Hyper(rows, (None,) * len(groups)))
        self.backend.update_(
            self.plan, [grads], torch.tensor(coefficient), found_inf, self.saturated
        )

    def everything(self):
        batch = self.batch
        kept = [*batch.masters, *(t for moment in batch.moments for t in moment)]
        return [t.clone() for t in [*kept, *(batch.weights or []), *(batch.steps or [])]]


def grouped(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    return params, [{"params": params[::2]}, {"params": params[1::2], "lr": 0.03}]


def gradients(sizes, step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_masters_are_those_of_torchs_fused_optimizer(name, dtype):
    _, groups = grouped(SIZES)
    optimizer = BUILD[name](groups)
    updates = Updates(cpu, optimizer, dtype)
    params = [p for group in groups for p in group["params"]]
    sizes = [p.numel() for p in params]
    for step in range(4):
        grads = gradients(sizes, step, dtype or torch.float32)
        updates.step(grads, 0.3)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float() * 0.3
        optimizer.step()
        assert same_bits([p.detach() for p in params], list(updates.batch.masters))
    if dtype is not None:
        assert same_bits(list(updates.batch.weights), [rounded(p, dtype) for p in params])


@COMPILES
@pytest.mark.parametrize("backend", [cpu, compiled], ids=["cpu", "compiled"])
def test_lion_has_the_bits_of_the_reference_backend(backend):
    _, groups = grouped([5, CHUNK // 8 + 3])
    optimizer = Lion(groups, lr=0.01, weight_decay=0.1)
    ours, theirs = (Updates(b, optimizer, torch.float16) for b in (backend, reference))
    for step in range(3):
        grads = gradients([5, CHUNK // 8 + 3], step, torch.float16)
        ours.step(grads, 0.3)
        theirs.step(grads, 0.3)
        assert same_bits(ours.everything(), theirs.everything())


@COMPILES
@pytest.mark.parametrize(("name", "dtype"), [("AdamW", torch.float16), ("nesterov", None)])
def test_a_compiled_pass_has_the_bits_of_the_reference_backend(name, dtype):
    sizes = [1, 7, 4099, 70000]
    _, groups = grouped(sizes)
    optimizer = BUILD[name](groups)
    sizes = [p.numel() for group in groups for p in group["params"]]
    ours, theirs = (Updates(b, optimizer, dtype) for b in (compiled, reference))
    for updates in (ours, theirs):
        updates.batch.masters[0][0] = 65530.0  # beyond float16
    for step in range(3):
        grads = gradients(sizes, step, dtype or torch.float32)
        ours.step(grads, 0.3)
        theirs.step(grads, 0.3)
        assert same_bits(ours.everything(), theirs.everything())
    # decay brings it below 65520 in the second step
    assert int(ours.saturated) == int(theirs.saturated) == (1 if dtype else 0)


@pytest.mark.parametrize("name", BUILD)
def test_a_skipped_update_changes_nothing_and_the_next_one_is_the_first(name):
    _, groups = grouped([5, 70])
    optimizer = BUILD[name](groups)
    skipped, plain = (Updates(cpu, optimizer, torch.float16) for _ in range(2))
    grads = gradients([5, 70], 0, torch.float16)
    before = skipped.everything()
    skipped.step(grads, 0.3, torch.tensor(1, dtype=torch.int32))
    assert same_bits(skipped.everything(), before)
    skipped.step(grads, 0.3)
    plain.step(grads, 0.3)
    assert same_bits(skipped.everything(), plain.everything())


def test_weights_that_take_their_first_step_late_are_first_all_the_same():
    _, groups = grouped([5, 70])
    optimizer = BUILD["momentum"](groups)
    updates = Updates(cpu, optimizer, torch.float16)
    updates.batch.steps[0].fill_(3)
    updates.batch.moments[0][0].fill_(1.0)
    expected = Updates(reference, optimizer, torch.float16)
    expected.batch.steps[0].fill_(3)
    expected.batch.moments[0][0].fill_(1.0)
    grads = [torch.full((5,), 2.0).half(), torch.full((70,), 2.0).half()]
    updates.step(grads, 0.5)
    expected.step(grads, 0.5)
    # whole numbers and quarters: every order of operations gives the same
    assert torch.allclose(updates.batch.moments[0][0], expected.batch.moments[0][0], rtol=1e-6)
    assert torch.equal(updates.batch.moments[0][1], torch.ones(70))


def test_clamped_weights_are_counted_and_finite():
    weight = torch.nn.Parameter(torch.full((10,), 65000.0).half())
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD([weight], lr=1000.0), mpcore.NoLossScale(), path="fused"
    )
    weight.grad = -torch.ones(10).half()
    optimizer.step()
    assert optimizer.backend == "cpu"
    assert weight.tolist() == [65504.0] * 10
    assert optimizer.saturated == 10
    assert optimizer.state[weight]["master"].tolist() == [65992.0] * 10


def test_an_update_without_preparation_is_refused():
    updates = Updates(cpu, BUILD["AdamW"](grouped([3, 4])[1]), torch.float16)
    with pytest.raises(mpcore.errors.StageError, match="prepared"):
        cpu.update_(updates.plan, [[]], torch.tensor(1.0), ZERO, updates.saturated)
