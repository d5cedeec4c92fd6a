"""Every dense class of torch.optim, in the wrapper and alone: the same bits, overflows or not."""

import pytest
import torch

from mpcore_testing.engines import GENERAL
from mpcore_testing.optimizers import OPTIONS, Case, dense_classes, step_cases, uncovered
from mpcore_testing.twins import LOSS_SCALE, Twins, mixed_groups, random_gradient, spoil

INF, NAN = float("inf"), float("nan")
STEPS = 100
#: step -> (value, number of the parameter whose gradient gets it); the first and the last included
OVERFLOWS = {
    0: (INF, 0),
    1: (-INF, 1),
    2: (NAN, 2),
    13: (INF, -1),
    14: (NAN, 0),
    50: (-INF, 3),
    77: (NAN, 4),
    99: (INF, 1),
}
#: steps on which no parameter has a gradient
EMPTY = {30, 31}
#: this parameter has its first gradient in this step, one that overflows elsewhere
LATE, LATE_STEP = 3, 13
FIRST_CLEAN = 3


def gradients(twins, step, generator, *, starts_together):
    """Random scaled gradients; now and then a parameter has none, and some steps overflow."""
    scale = twins.scale.scale
    grads = [random_gradient(p, scale, generator) for p in twins.params]
    absent = torch.rand(len(grads), generator=generator) < 0.15
    value, target = OVERFLOWS.get(step, (None, 0))
    if value is not None:
        grads[target] = spoil(grads[target], value, generator)
        absent[target] = False
    if step <= LATE_STEP:
        absent[LATE] = step < LATE_STEP
    if starts_together and step <= FIRST_CLEAN:
        absent[:] = False
    return [None if absent[i] or step in EMPTY else grad for i, grad in enumerate(grads)]


def run(twins, seed, *, starts_together):
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        if step == 40:
            twins.set_lr(0.5)
        assert twins.wrapped.loss_scale == twins.scale.scale
        twins.wrapped.scale(torch.ones(()))
        twins.give(gradients(twins, step, generator, starts_together=starts_together))
        twins.step(overflow=step in OVERFLOWS)
        assert twins.differences() == [], f"after step {step}"
        if step not in EMPTY:
            assert twins.wrapped.last_step.skipped == (step in OVERFLOWS)
        twins.wrapped.zero_grad()


def test_every_dense_class_of_torch_optim_is_covered():
    assert uncovered() == set(), "add options for the new class"
    assert len(dense_classes()) >= 12  # the search itself found something


@pytest.mark.parametrize("case", step_cases(), ids=str)
def test_masters_are_those_of_the_wrapped_optimizer_over_fp32_copies(case):
    generator = torch.Generator().manual_seed(len(str(case)))
    groups = mixed_groups(generator, matrices_only=case.matrices_only)
    twins = Twins.of(case, groups)
    start = [p.detach().clone() for p in twins.params]
    run(twins, seed=1, starts_together=case.starts_together)
    assert twins.wrapped.skipped_steps == len(OVERFLOWS)
    assert twins.wrapped.steps == STEPS - len(EMPTY)
    # the comparison means something: everything moved, and stayed finite
    for param, before in zip(twins.params, start, strict=True):
        assert torch.isfinite(param).all()
        assert not torch.equal(param, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"LBFGS"}))
def test_masters_keep_updates_that_sixteen_bits_would_lose(name, dtype):
    """A weight of 1 and updates below half its last place: only masters tell them apart."""
    if name not in dense_classes():
        pytest.skip(f"this torch has no {name}")
    case = Case(name, {"lr": 1e-5})
    twins = Twins.of(case, [[torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))]])
    (weight,) = twins.params
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        twins.wrapped.scale(torch.ones(()))
        twins.give([random_gradient(weight, twins.scale.scale, generator)])
        twins.step(overflow=False)
        assert twins.differences() == [], f"after step {step}"
    master = twins.master(weight)
    assert not torch.equal(master, weight.float())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_clipping_multiplies_every_gradient_once_and_rounds_once(name, early):
    """Norms of 5, 12 and 84 make one of 85 exactly, so the coefficient can have one value only."""
    values = [
        torch.tensor([3.0, 4.0]).half(),
        torch.tensor([12.0]).bfloat16(),
        torch.tensor([84.0]),
    ]
    params = [torch.nn.Parameter(torch.ones_like(v)) for v in values]
    twins = Twins.of(Case(name, {"lr": 0.1}), [params[:1], params[1:]])
    for step, max_norm in enumerate([1.0, 84.0, 86.0, 1e-3, 30.0, 1e30]):
        scale = twins.scale.scale
        twins.wrapped.scale(torch.ones(()))
        shrink = min(1.0, max_norm / (85.0 + 1e-6))
        coefficient = torch.tensor(shrink / scale, dtype=torch.float64).float()
        for param, fp32, value in zip(params, twins.copies, values, strict=True):
            param.grad = value * scale
            fp32.grad = param.grad.float() * coefficient
            if early:  # unscaled first, clipped after: a second multiply
                fp32.grad = value.float() * torch.tensor(shrink, dtype=torch.float64).float()
        if early:
            twins.wrapped.unscale_()
        assert twins.wrapped.clip_grad_norm_(max_norm).item() == 85.0
        twins.step(overflow=False)
        assert twins.differences() == [], f"after step {step}"
        assert twins.wrapped.last_step.grad_norm == 85.0


class AveragingDecay(torch.optim.Optimizer):
    """Moves every parameter in every step, with a gradient or without; so do some real ones."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                average.lerp_(param, 0.25)
                param.mul_(0.999)
                if param.grad is not None:
                    param.sub_(param.grad * group["lr"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_optimizer_that_moves_parameters_without_gradients_moves_masters_then_too(dtype):
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(3)]
    copies = [torch.nn.Parameter(p.detach().float()) for p in params]
    inner = AveragingDecay(params, lr=0.1)
    wrapped = GENERAL.wrap(inner, LOSS_SCALE)
    twins = Twins(wrapped, params, AveragingDecay(copies, lr=0.1), copies)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        wrapped.scale(torch.ones(()))
        grads = [random_gradient(p, twins.scale.scale, generator) for p in params]
        missing = {0: {2}, 1: {1, 2}, 6: {0, 1, 2}}.get(step, set())
        twins.give([None if number in missing else grad for number, grad in enumerate(grads)])
        twins.step(overflow=False)
        assert twins.differences() == [], f"after step {step}"
        wrapped.zero_grad()
