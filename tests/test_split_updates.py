"""Updates of split masters: the bits of float32 masters, step for step."""

import pytest
import torch
from mpcore.backends import compiled, cpu, reference
from mpcore.errors import ArgumentError, BackendError

from mpcore_testing.batches import FULL, HALF, OPTIONS, Hyper, make_batch, make_grads, scalar
from mpcore_testing.fused import Stepping, normal
from mpcore_testing.kernels import HALVES, assert_same_bits
from mpcore_testing.stores import kept, masters_of

BACKENDS = [reference, compiled]
SIZES = [0, 1, 15, 16, 17, 300, 4097]
LARGE = [2**16 + 33, 2**17]
ADAMW = OPTIONS[0][2]


def named(values):
    return "-".join(map(str, values[:2]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__.split(".")[-1])
@pytest.mark.parametrize("weight", HALVES)
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_masters_and_moments_have_the_bits_of_float32_masters(options, weight, backend):
    rule, moments, numbers = options
    plain = make_batch(moments, weight, SIZES, steps=0.0, make=normal)
    both = Stepping(reference, rule, plain), Stepping(backend, rule, kept(plain, "split"))
    for step in range(20):
        wide = step % 5 == 4  # gradients after `unscale_` are float32
        grads = make_grads(plain, FULL if wide else weight, 50 * step, normal)
        for stepping in both:
            stepping.step(grads, numbers, found_inf=int(step % 7 == 3))
    for one, other in zip(masters_of(both[1].batch), plain.masters, strict=True):
        assert_same_bits(one, other)
    for one, other in zip(both[1].batch.moments, plain.moments, strict=True):
        for a, e in zip(one, other, strict=True):
            assert_same_bits(a, e)
    assert both[0].saturated.item() == both[1].saturated.item() == 0
    if weight == HALF:  # ties of bfloat16 are documented to be another
        for one, other in zip(both[1].batch.weights, plain.weights, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__.split(".")[-1])
@pytest.mark.parametrize("weight", HALVES)
def test_a_skipped_step_changes_nothing(weight, backend):
    batch = kept(make_batch(2, weight, SIZES, steps=3.0), "split")
    before = [tensor.clone() for tensor in batch.everything()]
    stepping = Stepping(backend, "adam", batch)
    grads = make_grads(batch, weight, 1)
    stepping.step(grads, ADAMW, found_inf=1)
    for one, other in zip(batch.everything(), before, strict=True):
        assert_same_bits(one, other)
    assert stepping.saturated.item() == 0


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__.split(".")[-1])
@pytest.mark.parametrize("weight", HALVES)
def test_masters_too_large_for_their_weight_are_clamped_and_counted(weight, backend):
    largest = torch.finfo(weight).max
    plain = make_batch(0, weight, [40], steps=None)
    plain.masters[0].fill_(largest)
    plain.masters[0][1::2] = -largest
    batch = kept(plain, "split")
    stepping = Stepping(backend, "sgd", batch)
    grad = torch.zeros(40, dtype=FULL)
    grad[:20] = plain.masters[0][:20] * 0.5  # SGD subtracts it: towards 0
    grad[20:30] = plain.masters[0][20:30] * -0.001  # and away from it
    grad[30], grad[31], grad[32] = -torch.inf, torch.inf, torch.nan  # of no real step
    stepping.step([grad], (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), coefficient=1.0)
    expected = plain.masters[0] - grad
    expected = torch.where(expected.isfinite(), expected.clamp(-largest, largest), expected)
    assert stepping.saturated.item() == 10
    assert_same_bits(masters_of(batch)[0], expected)
    assert_same_bits(batch.weights[0].float()[20:], expected[20:])


def test_weights_that_are_parts_of_masters_take_no_edits():
    batch = kept(make_batch(0, HALF, [5], steps=None), "split")
    for backend in BACKENDS:
        plan = backend.plan_update("sgd", [batch])
        backend.prepare_(plan, Hyper.of((0.1, 0.0, 0.0, 0.0, 0.0, 0.0)))
        with pytest.raises(ArgumentError, match="edits: expected None with masters kept as"):
            backend.update_(
                plan,
                [make_grads(batch, HALF, 1)],
                scalar(1.0, FULL, "cpu"),
                scalar(0, torch.int32, "cpu"),
                scalar(0, torch.int64, "cpu"),
                edits=torch.zeros(1, 2, dtype=torch.int64),
            )


def test_the_cpu_backend_says_who_can():
    batch = kept(make_batch(0, HALF, [5], steps=None), "split")
    with pytest.raises(BackendError, match=r'as split, got "cpu".*Pass backend="compiled"'):
        cpu.plan_update("sgd", [batch])
