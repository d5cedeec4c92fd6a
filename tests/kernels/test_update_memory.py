"""Which memory update_ writes: tensors of any size, place and layout, and nothing around them."""

import pytest
import torch
import triton

import mpcore_kernels
from mpcore_kernels import _update_kernel
from mpcore_kernels._dtypes import access_bytes
from mpcore_kernels._update_kernel import CHUNK, ROUND
from mpcore_testing.batches import (
    COMBINATIONS,
    FULL,
    HALF,
    KINDS,
    OPTIONS,
    Batch,
    Hyper,
    make_batch,
    make_grads,
    scalar,
)
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import assert_same_bits, guarded, random_finite
from mpcore_testing.updates import assert_same_batches, update

SIZES = [0, 1, 7, ROUND - 1, ROUND, ROUND + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
RULE, MOMENTS, NUMBERS = OPTIONS[0]


@pytest.fixture(autouse=True)
def promises(monkeypatch):
    """Fails if a kernel promises an alignment that an address does not have; where interpreted.

    A device refuses such an access by itself.
    """
    kept = []
    if isinstance(_update_kernel.aligned_pointer, triton.JITFunction):
        return kept
    promise = _update_kernel.aligned_pointer

    def checked(address, start, FORMAT, OTHER):
        kept.append(int(address.handle.data.item()))
        assert kept[-1] % access_bytes(FORMAT, OTHER) == 0, f"{FORMAT} at {kept[-1]}"
        return promise(address, start, FORMAT, OTHER)

    monkeypatch.setattr(_update_kernel, "aligned_pointer", checked)
    return kept


class Placed:
    """A batch and its gradients in poisoned buffers, each tensor at its own offset."""

    def __init__(self, batch, grads, device, offset):
        self.all = []
        self.device = device
        self.offset = offset
        moments = [self._place(m, 5 + k if k else 1) for k, m in enumerate(batch.moments)]
        weights = None if batch.weights is None else self._place(batch.weights, 2)
        masters = self._place(batch.masters, 0)
        steps = self._place([step.view(1) for step in batch.steps], 3)
        steps = [step.view(()) for step in steps]
        self.batch = Batch(masters, weights, moments, steps, batch.groups)
        self.grads = self._place(grads, 4)

    def _place(self, tensors, kind):
        placed = [guarded(t, self.device, self.offset(kind, i)) for i, t in enumerate(tensors)]
        self.all += placed
        return [p.tensor for p in placed]

    def check(self, expected, grads):
        assert_same_batches([self.batch], [expected])
        for actual, e in zip(self.grads, grads, strict=True):
            assert_same_bits(actual, e)
        for placed in self.all:
            placed.assert_margins_intact()


def run(rule, moments, numbers, grad, weight, sizes, device, offset=lambda kind, i: 0):
    """Updates once, wherever `offset` puts the tensors, and compares."""
    batch = make_batch(moments, weight, sizes)
    grads = make_grads(batch, grad, 50)
    placed = Placed(batch, grads, device, offset)
    plan = mpcore_kernels.plan_update(rule, [placed.batch])
    mpcore_kernels.prepare_(plan, Hyper.of(numbers))
    saturated = scalar(0, torch.int64, device)
    arguments = (scalar(0.37, FULL, device), scalar(0, torch.int32, device), saturated)
    mpcore_kernels.update_(plan, [placed.grads], *arguments)
    clamped = update(rule, [batch], [grads], Hyper.of(numbers), 0.37)
    placed.check(batch, grads)
    assert saturated.item() == clamped


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind[:2])))
@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_of_any_size_is_updated_and_nothing_around_it(kind, size, device):
    run(*kind, HALF, HALF, [size], device)


def test_full_chunks_at_aligned_addresses_and_no_others_are_promised(device, promises):
    if device.type == "cuda":
        pytest.skip("seen in the interpreter alone")
    run(RULE, MOMENTS, NUMBERS, HALF, HALF, [2 * CHUNK + 3, CHUNK - 1], device)
    # gradient and weight once, master and moments when read and when written, in two chunks
    assert len(promises) == 2 * (2 + 2 * 3)
    assert len(set(promises)) == 5


@pytest.mark.parametrize(("grad", "weight"), COMBINATIONS)
def test_tensors_of_mixed_sizes_are_updated_in_one_launch(grad, weight, device, launched):
    sizes = [SIZES[(3 * i) % len(SIZES)] for i in range(2 * len(SIZES))]
    run(RULE, MOMENTS, NUMBERS, grad, weight, sizes, device)
    assert [variant.name.split()[0] for variant in launched] == ["prepare", "update"]


@pytest.mark.parametrize(
    ("grad", "weight", "kind"),
    # without a weight there is no place for it
    [(*pair, kind) for pair in COMBINATIONS for kind in (*range(5), 6) if pair[1] or kind != 2],
)
def test_one_tensor_at_an_odd_address_is_enough_to_need_the_other_path(grad, weight, kind, device):
    sizes = [CHUNK + 5] * 3

    def offset(other, index):
        return index * (other == kind)

    run(RULE, MOMENTS, NUMBERS, grad, weight, sizes, device, offset)


def test_every_tensor_at_another_offset(device):
    run(RULE, 3, NUMBERS, HALF, HALF, SIZES, device, lambda kind, i: (3 * kind + 5 * i) % 8)


@pytest.mark.parametrize("weight", [HALF, None])
def test_dense_tensors_keep_their_order_of_dimensions(weight, device):
    base = random_finite(2 * 3 * 4 * 5, FULL, seed=3).view(2, 3, 4, 5)
    layouts = (
        base.clone(memory_format=torch.channels_last),
        base.permute(3, 0, 2, 1),
        base[0, 0].t(),
        base[0, 0, 0, 0],
    )
    masters = [t.clone(memory_format=torch.preserve_format) for t in layouts]
    batch = Batch(
        masters=masters,
        weights=None if weight is None else [m.to(weight) for m in masters],
        moments=[[m.abs() for m in masters] for _ in range(2)],
        steps=[torch.tensor(1.0) for _ in masters],
        groups=[0] * len(masters),
    )
    twin = Twin(RULE, [batch], device)
    grads = make_grads(batch, weight or FULL, 5)
    twin.step([grads], Hyper.of(NUMBERS))
    strides = [t.stride() for t in batch.everything()]
    assert [t.stride() for t in twin.actual[0].everything()] == strides


def test_gradients_may_share_memory_with_each_other(device):
    batch = make_batch(2, HALF, [50, 50])
    twin = Twin(RULE, [batch], device)
    shared = random_finite(60, HALF, seed=1)
    hyper = Hyper.of(NUMBERS)
    placed = shared.to(device)
    mpcore_kernels.prepare_(twin.plan, hyper)
    found_inf = scalar(0, torch.int32, device)
    grads = [[placed[:50], placed[10:]]]
    mpcore_kernels.update_(twin.plan, grads, scalar(0.5, FULL, device), found_inf, twin.saturated)
    twin.follow([[shared[:50], shared[10:]]], hyper, 0.5)


def test_autograd_is_told_of_everything_that_is_written_and_nothing_else(device):
    batch = make_batch(2, HALF, [3, 0]).on(device)
    plan = mpcore_kernels.plan_update(RULE, [batch])
    grads = [g.to(device) for g in make_grads(batch, HALF, 1)]
    read = [*grads, scalar(0.5, FULL, device), scalar(0, torch.int32, device)]
    saturated = scalar(0, torch.int64, device)
    mpcore_kernels.prepare_(plan, Hyper.of(NUMBERS))
    written = [*batch.everything(), saturated]
    before = [t._version for t in written], [t._version for t in read]
    mpcore_kernels.update_(plan, [grads], *read[-2:], saturated)
    assert all(t._version > v for t, v in zip(written, before[0], strict=True))
    assert [t._version for t in read] == before[1]


def test_backward_through_a_graph_from_before_the_update_raises(device):
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    loss = (weight * weight).sum()
    batch = Batch([weight], None, [], None, [0])
    plan = mpcore_kernels.plan_update("sgd", [batch])
    mpcore_kernels.prepare_(plan, Hyper.of((1.0, 0.0, 0.0, 0.0, 0.0, 0.0)))
    state = (scalar(1.0, FULL, device), scalar(0, torch.int32, device))
    mpcore_kernels.update_(
        plan, [[torch.ones(2, device=device)]], *state, scalar(0, torch.int64, device)
    )
    assert weight.tolist() == [0.0, 0.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
