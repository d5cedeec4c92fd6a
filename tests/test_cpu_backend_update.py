"""update_ of the cpu backend, bit for bit against `torch.optim` with fused=True and plain rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import ScaleMove, cpu, reference
from mpcore.backends._blocks import CHUNK
from mpcore.errors import ArgumentError, StageError
from mpcore.optim import Lion
from mpcore.updates import RULES, Batch, Hyper

from mpcore_testing.cpu_updates import (
    GO,
    OPTIMIZERS,
    SKIP,
    Ours,
    assert_same_state,
    noise,
    rule_name,
    run,
    twins,
)
from mpcore_testing.kernels import HALVES, assert_same_bits, random_bits

SMALL = [1, 15, 16, 17, 63, 64, 65, 1000]
LARGE = [CHUNK - 1, 70, CHUNK + 1, 2 * CHUNK + 37]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [None, *HALVES])
def test_small_tensors_are_torchs_bits(name, dtype):
    shapes = [(n,) for n in SMALL] * 3
    for coefficient in (2.0**-6, 0.013, 1.0):
        ours, theirs, params = twins(name, shapes, dtype)
        grad_dtype = dtype or torch.float32
        run(ours, theirs, params, torch.tensor(coefficient), [grad_dtype] * len(shapes))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_remainder_of_a_chunk_is_torchs_bits(name):
    shapes = [(n,) for n in LARGE]
    ours, theirs, params = twins(name, shapes, torch.float16)
    run(ours, theirs, params, torch.tensor(0.013), [torch.float16] * len(shapes), steps=2)


@pytest.mark.parametrize("name", ["adamw", "nesterov", "adagrad"])
def test_float32_gradients_of_16_bit_weights(name):
    ours, theirs, params = twins(name, [(n,) for n in SMALL], torch.bfloat16)
    run(ours, theirs, params, torch.tensor(0.3), [torch.float32] * len(SMALL))


@pytest.mark.parametrize("name", ["amsgrad", "momentum", "adagrad"])
def test_groups_that_take_turns(name):
    groups = [0, 1, 0, 1, 1, 0, 1, 0]
    ours, theirs, params = twins(
        name, [(n,) for n in SMALL], torch.float16, groups, lrs=(0.1, 0.003)
    )
    run(ours, theirs, params, torch.tensor(0.3), [torch.float16] * len(SMALL))


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_any_dense_layout(name):
    base = [noise((4, 3, 5, 2), i) for i in range(3)]
    layouts = [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(2, 0, 3, 1),
        lambda t: t[:1],
    ]
    known, options = RULES[rule_name(OPTIMIZERS[name][0])], OPTIMIZERS[name][1]
    params = [torch.nn.Parameter(lay(t.clone())) for lay, t in zip(layouts, base, strict=True)]
    theirs = OPTIMIZERS[name][0](params, fused=True, **options)
    group = theirs.param_groups[0]
    masters = [lay(t.clone()) for lay, t in zip(layouts, base, strict=True)]
    batch = Batch(
        masters,
        [torch.empty_like(m, dtype=torch.float16) for m in masters],
        [[torch.zeros_like(m) for m in masters] for _ in known.moments(group)],
        [torch.zeros(()) for _ in masters],
        [0, 0, 0],
    )
    hyper = Hyper((known.numbers(group, group["lr"]),), (None,))
    ours = Ours(known.name, batch, hyper, cpu.plan_update(known.name, [batch]), torch.tensor(0))
    for step in range(2):
        grads = [
            torch.empty_like(m, dtype=torch.float16).copy_(noise(m.shape, 7 + step + i))
            for i, m in enumerate(masters)
        ]
        ours.step(grads, torch.tensor(0.3))
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.empty_like(param).copy_(grad.float() * torch.tensor(0.3))
        theirs.step()
    assert_same_state(ours, theirs, params)
    ours.assert_weights_rounded()


@pytest.mark.parametrize("name", ["adamw", "nesterov", "sgd", "adagrad"])
@pytest.mark.parametrize("skips", [(True, False, False), (False, True, False), (True, True, False)])
def test_a_skipped_step_changes_nothing(name, skips):
    ours, theirs, params = twins(name, [(n,) for n in SMALL], torch.float16)
    for step, skip in enumerate(skips):
        before = [tensor.clone() for tensor in ours.tensors()]
        grads = [(noise(p.shape, step + i) * 8).half() for i, p in enumerate(params)]
        if skip:
            grads[0].fill_(torch.inf)
        ours.step(grads, torch.tensor(0.3), SKIP if skip else GO)
        if skip:
            for tensor, copy in zip(ours.tensors(), before, strict=True):
                assert_same_bits(tensor, copy)
        else:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.float() * torch.tensor(0.3)
            theirs.step()
            assert_same_state(ours, theirs, params)


def test_tensors_that_take_their_first_step_late_are_first_all_the_same():
    ours, _, _ = twins("momentum", [(5,), (70,)], torch.float16)
    ours.batch.steps[0].fill_(3)
    ours.batch.moments[0][0].fill_(1.0)
    ours.step([torch.full((5,), 2.0).half(), torch.full((70,), 2.0).half()], torch.tensor(0.5))
    # the first takes the gradient for its velocity, the other one has one already
    assert torch.allclose(ours.batch.moments[0][0], torch.tensor(1.9), rtol=2.0**-23)
    assert torch.equal(ours.batch.moments[0][1], torch.ones(70))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", [[CHUNK + 37], [500, 3, 100]])
def test_weights_that_are_clamped_are_counted(dtype, sizes):
    largest = torch.finfo(dtype).max
    ours, theirs, params = twins("sgd", [(n,) for n in sizes], dtype)
    for i in (0, -1):
        with torch.no_grad():
            params[i][-1] = ours.batch.masters[i][-1] = -largest * (1 - 2.0**-9)
    run(ours, theirs, params, torch.tensor(2.0**-8), [dtype] * len(sizes), steps=1)
    assert ours.saturated.item() == 3
    for i in (0, -1):
        ours.batch.masters[i][-1] = -largest * (1 + 2.0**-8)
    ours.hyper = Hyper(
        tuple((0.0, *row[1:3], 0.0, *row[4:]) for row in ours.hyper.numbers), (None,)
    )
    ours.step([torch.zeros(n, dtype=dtype) for n in sizes], torch.tensor(1.0))
    assert ours.batch.weights[0][-1].item() == -largest
    assert ours.saturated.item() == 3 + (1 if len(sizes) == 1 else 2)


@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    lr=st.floats(2.0**-20, 1.0),
    coefficient=st.floats(2.0**-20, 4.0, width=32),
    dtype=st.sampled_from(HALVES),
)
def test_any_sizes_and_numbers_are_torchs_bits(name, sizes, lr, coefficient, dtype):
    ours, theirs, params = twins(name, [(n,) for n in sizes], dtype, lrs=(lr,))
    run(ours, theirs, params, torch.tensor(coefficient), [dtype] * len(sizes), steps=2)


@pytest.mark.parametrize("sizes", [SMALL, [CHUNK + 37, 5, CHUNK // 8 + 1]])
@pytest.mark.parametrize("dtype", [None, *HALVES])
def test_lion_is_bitwise_the_reference_backend(sizes, dtype):
    # no kernel of torch; tests of the reference backend judge the arithmetic itself
    groups = [i % 2 for i in range(len(sizes))]
    options = Lion([torch.zeros(1)], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1).param_groups
    options = [options[0], {**options[0], "lr": 0.003, "maximize": True}]
    shapes = [(n,) for n in sizes]
    sides = [
        Ours.of("lion", shapes, groups, options, dtype, backend=backend)
        for backend in (cpu, reference)
    ]
    for step in range(3):
        grads = [noise(shape, 9 * step + i) for i, shape in enumerate(shapes)]
        grads = [grad.to(dtype or torch.float32) for grad in grads]
        for ours, backend in zip(sides, (cpu, reference), strict=True):
            ours.step(grads, torch.tensor(0.3), backend=backend)
    for actual, expected in zip(sides[0].tensors(), sides[1].tensors(), strict=True):
        assert_same_bits(actual, expected)


def test_a_learning_rate_in_a_tensor_is_read_when_prepared():
    ours, theirs, params = twins("adamw", [(70,)], torch.float16)
    rate = torch.tensor(0.25)
    ours.hyper = Hyper(ours.hyper.numbers, (rate,))
    theirs.param_groups[0]["lr"] = 0.25
    run(ours, theirs, params, torch.tensor(0.3), [torch.float16], steps=2)


def test_bad_values_reach_the_weights_as_they_are():
    ours, _, params = twins("sgd", [(300,), (300,)], torch.float16)
    grads = [random_bits(300, torch.float16, seed) for seed in (1, 2)]
    ours.step(grads, torch.tensor(1.0))  # found_inf is not set: somebody else decided
    lr, decay = torch.tensor(0.1), 0.05
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        with torch.no_grad():
            expected = param - lr * (grad.float() + decay * param)
        assert torch.equal(ours.batch.masters[i].isnan(), expected.isnan())
        assert torch.equal(ours.batch.masters[i].isinf(), expected.isinf())
    ours.assert_weights_rounded()


@pytest.mark.parametrize("found_inf", [GO, SKIP])
def test_the_scale_moves_in_every_step(found_inf):
    tensors = [torch.tensor(8.0), *(torch.tensor(n, dtype=torch.int32) for n in (0, 1))]
    tensors.append(torch.tensor([4, 2, 0, 0, 0, 0]))
    move = ScaleMove(*tensors, 2.0, 0.5, 2000, 1.0, 2.0**24, 1, 0, (0, 1))
    ours, _, _ = twins("sgd", [(3,)], torch.float16)
    cpu.prepare_(ours.plan, ours.hyper)
    grads = [[torch.ones(3).half()]]
    cpu.update_(ours.plan, grads, torch.tensor(1.0), found_inf, ours.saturated, then=move)
    bad = bool(found_inf)
    expected = [4.0, 0, 0, [5, 3, 1, 0, 0, 0]] if bad else [8.0, 1, 1, [5, 2, 0, 0, 1, 0]]
    assert [tensor.tolist() for tensor in tensors] == expected


def test_refusals():
    ours, _, _ = twins("sgd", [(3,)], torch.float16)
    grads = [torch.ones(3).half()]
    with pytest.raises(StageError, match="expected a plan that was prepared"):
        cpu.update_(ours.plan, [grads], torch.tensor(1.0), GO, ours.saturated)
    ours.step(grads, torch.tensor(1.0))
    with pytest.raises(StageError, match="expected a plan that was prepared"):
        cpu.update_(ours.plan, [grads], torch.tensor(1.0), GO, ours.saturated)
    with pytest.raises(ArgumentError, match="rule: expected one of adam"):
        cpu.plan_update("adan", [ours.batch])
    with pytest.raises(ArgumentError, match="lists of one length"):
        cpu.plan_update("sgd", [Batch(ours.batch.masters, None, [], None, [0, 0])])
