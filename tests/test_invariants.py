"""The invariants of the design by number: 1, 2, 4, 9, 10 and 13.

5, 6 and 7 are in `test_invariants_of_scaling.py`, 3 in `conformance/`.
"""

import math

import mpcore
import pytest
import torch

from mpcore_testing.bits import bits, same_bits
from mpcore_testing.engines import ENGINES, GENERAL, engine_cases
from mpcore_testing.optimizers import cases
from mpcore_testing.rounding import edge_masters, round_by_hand
from mpcore_testing.snapshots import model_params, snapshot
from mpcore_testing.syncs import fake_cuda

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
INF, NAN = math.inf, math.nan


class Restless(torch.optim.SGD):
    """Draws random numbers, counts in its groups and keeps a step count: all to be left alone."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.add_(torch.randn_like(param), alpha=0.1)
                    self.state[param]["draws"] = self.state[param].get("draws", 0) + 1
        return super().step(closure)


INNER = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, fused=True),
    "Adam amsgrad fused": lambda groups: torch.optim.Adam(groups, amsgrad=True, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5),
    "SGD fused": lambda groups: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, weight_decay=0.5, fused=True
    ),
    "Adagrad fused": lambda groups: torch.optim.Adagrad(groups, weight_decay=0.5, fused=True),
    "restless": lambda groups: Restless(groups, lr=0.1, momentum=0.9, weight_decay=0.5),
}


def mixed_optimizer(engine, inner, loss_scale):
    """Two groups; a zero-sized and a 0-d parameter, and a master beyond what float16 can hold."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        [((3, 2), HALF), ((4,), BRAIN), ((0, 2), HALF)],
        [((5,), FULL), ((), HALF), ((), BRAIN)],
    ]
    groups = []
    for number, entries in enumerate(shapes):
        values = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in entries]
        params = [torch.nn.Parameter(value) for value in values]
        groups.append({"params": params, "lr": 0.1 / (number + 1)})
    optimizer = engine.wrap(INNER[inner](groups), loss_scale)
    wide = groups[0]["params"][0]
    optimizer.adopt_masters([(wide, torch.full(wide.shape, 7e4))])
    return optimizer


def one_step(optimizer, seed, *, spoil=None, value=INF, way="step"):
    """A step over random gradients; with `spoil`, that parameter's gradient holds `value`."""
    generator = torch.Generator().manual_seed(seed)
    params = model_params(optimizer)
    optimizer.scale(torch.ones(()))
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * optimizer.loss_scale
        param.grad = grad.to(param.dtype)
    if spoil is not None:
        params[spoil].grad.view(-1)[-1] = value
    before = snapshot(optimizer)
    if way == "unscale":
        optimizer.unscale_()
    elif way == "clip":
        optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    after = snapshot(optimizer)
    optimizer.zero_grad()
    return before, after


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("spoil", [0, 1, 3, 4, 5])
@pytest.mark.parametrize(("inner", "engine"), engine_cases(INNER))
def test_invariant_1_a_skipped_step_changes_nothing(engine, inner, spoil, value):
    optimizer = mixed_optimizer(engine, inner, mpcore.DynamicLossScale(init=2.0**4))
    for seed in range(3):
        one_step(optimizer, seed)
    assert optimizer.saturated > 0
    for way in ("step", "unscale", "clip"):
        before, after = one_step(optimizer, 7, spoil=spoil, value=value, way=way)
        assert optimizer.last_step.skipped
        different = [key for key in before if not same_bits(before[key], after[key])]
        assert different == []
    assert (optimizer.steps, optimizer.skipped_steps, optimizer.loss_scale) == (6, 3, 2.0)


@pytest.mark.parametrize("spoil", [0, 1, 3, 4, 5])
@pytest.mark.parametrize(("inner", "engine"), engine_cases(INNER))
def test_invariant_1_holds_on_the_very_first_step(engine, inner, spoil):
    """The first step may create state and masters; nothing of them may show the overflow."""
    torch.manual_seed(0)
    skipping = mixed_optimizer(engine, inner, mpcore.StaticLossScale(16.0))
    before, after = one_step(skipping, 7, spoil=spoil)
    assert skipping.last_step.skipped
    for key in ("weights", "options", "saturated", "generator", "gradients"):
        assert same_bits(before[key], after[key]), key
    for state in after["inner state"]:
        assert all(value is None or not bits(value).any() for value in state.values())
    for seed in range(3):
        one_step(skipping, seed)
    torch.manual_seed(0)
    clean = mixed_optimizer(engine, inner, mpcore.StaticLossScale(16.0))
    for seed in range(3):
        one_step(clean, seed)
    assert same_bits(snapshot(skipping), snapshot(clean))


@pytest.mark.parametrize("way", ["step", "unscale", "clip"])
@pytest.mark.parametrize("fused", [False, True])
def test_invariant_2_gradients_are_unscaled_by_the_scale_that_scaled_them(engine, fused, way):
    """Growth after every clean step and SGD with lr=1: each update must be the gradient itself."""
    gradient = torch.tensor([1.0, -2.0, 0.25, 3.0])
    weights = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (HALF, BRAIN, FULL)]
    optimizer = engine.wrap(
        torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0, fused=fused),
        mpcore.DynamicLossScale(init=8, growth_interval=1, min_scale=2, max_scale=64),
    )
    overflows = [False] * 4 + [True] * 6 + [False, False, True, False]
    expected = [8, 16, 32, 64, 64, 32, 16, 8, 4, 2, 2, 4, 8, 4]
    masters = [torch.zeros(4)] * 3
    for overflow, scale in zip(overflows, expected, strict=True):
        assert optimizer.loss_scale == scale
        for _ in range(2):  # accumulated over two backward passes
            loss = sum((w.float() * gradient).sum() for w in weights) * (INF if overflow else 0.5)
            optimizer.backward(loss)
        if way == "unscale":
            optimizer.unscale_()
        elif way == "clip":
            optimizer.clip_grad_norm_(1e6)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step.loss_scale == scale
        if not overflow:
            masters = [master - gradient for master in masters]
        now = [optimizer.state[w]["master"] for w in weights[:2]] + [weights[2].detach()]
        assert same_bits(now, masters)
    assert optimizer.loss_scale == 8


@pytest.mark.parametrize("container", [lambda t: t, lambda t: [t], lambda t: (t, [t])])
def test_invariant_2_the_loss_is_scaled_in_float32_whatever_it_came_in(engine, container):
    """4 * 2^15 is infinite in float16; the gradient of it, 2^15, is not."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=HALF))
    optimizer = engine.wrap(torch.optim.SGD([weight], lr=0.5), mpcore.StaticLossScale(2.0**15))
    scaled = optimizer.scale(container((weight * 4.0).sum() - 3.0))
    while not isinstance(scaled, torch.Tensor):
        scaled = scaled[-1]
    assert same_bits(scaled.detach(), torch.tensor(2.0**15))
    # a 0-d tensor would be promoted in any case, one of several elements would not
    assert same_bits(optimizer.scale(torch.full((3,), 4.0, dtype=HALF)), torch.full((3,), 2.0**17))
    loss = (weight + 3.0).sum()
    assert loss.dtype == HALF
    assert optimizer.scale(loss).item() == 2.0**17
    optimizer.backward(loss)
    optimizer.step()
    assert not optimizer.last_step.skipped
    assert weight.item() == 0.5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_invariant_4_weights_are_masters_rounded_to_nearest_even_and_saturated(
    engine, dtype, fused
):
    masters = edge_masters(dtype)
    weight = torch.nn.Parameter(torch.zeros(len(masters), dtype=dtype))
    inner = torch.optim.SGD([weight], lr=0.0, fused=fused)
    optimizer = engine.wrap(inner)
    optimizer.adopt_masters([(weight, masters.clone())])

    def step(gradient):
        optimizer.scale(torch.ones(()))
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()

    step(INF)
    assert not bits(weight).any()  # a skipped step writes nothing and counts nothing
    assert optimizer.saturated == 0
    step(0.0)
    expected, clamped = round_by_hand(masters, dtype)
    nan = torch.isnan(masters)
    if str(engine) in ("reference-fused", "compiled-fused"):
        # the written arithmetic has p * 0 for "no decay": an infinity becomes NaN, still visible
        nan |= torch.isinf(masters)
    assert torch.equal(torch.isnan(weight), nan)
    assert torch.equal(torch.isfinite(weight), torch.isfinite(masters))
    assert torch.equal(bits(weight)[~nan], expected[~nan])
    assert optimizer.saturated == clamped > 0
    assert same_bits(optimizer.state[weight]["master"][~nan], masters[~nan])


# the fused path asks for addresses, which fake tensors do not have, to see whether they changed
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.backend == "reference"], ids=str)
def test_invariant_9_a_step_syncs_only_when_its_outcome_is_read(engine):
    with fake_cuda() as watch:
        params = [torch.nn.Parameter(torch.empty(3, dtype=d, device="cuda")) for d in (HALF, FULL)]
        optimizer = engine.wrap(torch.optim.AdamW(params, fused=True))
        for _ in range(3):
            optimizer.scale(torch.empty((), device="cuda"))
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert watch.operations > 0
        assert watch.reads == 0
        with pytest.raises(RuntimeError, match="the host read a value"):
            optimizer.last_step.skipped  # noqa: B018 - reading it is the point


@pytest.mark.parametrize("dtype", [FULL, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_invariant_10_without_a_scale_float32_training_is_bitwise_the_wrapped_optimizer(
    case, dtype
):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (6, 4)] if case.matrices_only else [(3, 5), (7,), ()]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    plain_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    wrapped = GENERAL.wrap(case.build(params), mpcore.NoLossScale())
    plain = case.build(plain_params)
    bad_steps = {0, 7}

    def closure_over(tensors, optimizer, backward, factor):
        def closure():
            optimizer.zero_grad()
            loss = sum((t.sin() + 0.1 * t * t).sum() for t in tensors)
            backward(loss * factor)
            return loss

        return closure

    for step in range(15):
        factor = NAN if step in bad_steps else 1.0
        ours = closure_over(params, wrapped, wrapped.backward, factor)
        theirs = closure_over(plain_params, plain, torch.Tensor.backward, factor)
        if case.name == "LBFGS":
            wrapped.step(ours)
        else:
            ours()
            wrapped.step()
        if step not in bad_steps:
            plain.step(theirs)
        assert wrapped.last_step.skipped == (step in bad_steps)
        for param, other in zip(params, plain_params, strict=True):
            assert same_bits(param.detach(), other.detach())
            assert torch.isfinite(param).all()
            if step not in bad_steps:
                assert same_bits(param.grad, other.grad)
                assert same_bits(dict(wrapped.state[param]), dict(plain.state[other]))


GRAPH_INNER = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize("inner", GRAPH_INNER)
def test_invariant_13_a_graph_from_before_a_step_cannot_be_backpropagated_after_it(
    engine, inner, dtype, with_closure
):
    """torch's fused optimizers write float32 parameters without telling autograd."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = engine.wrap(GRAPH_INNER[inner]([weight]), mpcore.StaticLossScale(8.0))
    for _ in range(2):  # the first step and a later one
        optimizer.zero_grad()
        loss = (weight * weight).float().sum()  # its backward pass needs the weight as it was
        optimizer.backward(loss, retain_graph=True)
        optimizer.backward(loss, retain_graph=True)  # fine before the step

        def closure(loss=loss):
            optimizer.backward(loss, retain_graph=True)
            return loss

        optimizer.step(closure if with_closure else None)
        assert not optimizer.last_step.skipped
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            optimizer.backward(loss)
