"""The compiled backend: bitwise NumPy's elementary operations, on any number of threads."""

import ctypes

import mpcore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpcore.backends import ScaleMove, _c_command, _c_compiler, _c_update, _c_work, compiled, cpu
from mpcore.backends._c_work import CHUNK
from mpcore.errors import ArgumentError, BackendError, StageError

from mpcore_testing.batches import (
    COMBINATIONS,
    FULL,
    HALF,
    KINDS,
    OPTIONS,
    Batch,
    Hyper,
    Move,
    make_batch,
    make_grads,
)
from mpcore_testing.fused import Twin
from mpcore_testing.kernels import HALVES, assert_same_bits, random_bits
from mpcore_testing.strategies import float32_bits

# around the vectors of the loops and the blocks that stay in the first-level cache
SIZES = [0, 1, 7, 8, 15, 16, 17, 300, 511, 512, 513, 1025]
LARGE = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 37]
PLAIN_SGD = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
ADAMW = OPTIONS[0][2]


def named(values):
    return "-".join(map(str, values[:2]))


def twin(rule, *batches):
    return Twin(rule, batches, "cpu", backend=compiled)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), COMBINATIONS)
def test_several_steps_give_the_bits_of_numpy(options, grad, weight):
    rule, moments, numbers = options
    batch = make_batch(moments, weight, SIZES, steps=0.0)
    both = twin(rule, batch)
    for step in range(3):
        both.step([make_grads(batch, grad, 50 * step)], Hyper.of(numbers))
    assert [step.item() for step in both.actual[0].steps] == [3.0] * len(SIZES)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize(("grad", "weight"), COMBINATIONS)
def test_any_bits_in_every_tensor_give_the_bits_of_numpy(options, grad, weight):
    rule, moments, numbers = options
    batch = make_batch(moments, weight, [5000], make=random_bits)
    if rule != "adagrad":
        # a sum of squares is not negative, a mean may be
        batch.moments[:1] = [[-m for m in moment] for moment in batch.moments[:1]]
    both = twin(rule, batch)
    both.step([make_grads(batch, grad, 7, random_bits)], Hyper.of(numbers), coefficient=2.0**-10)


@given(
    bits=st.lists(float32_bits(), min_size=1, max_size=40),
    coefficient=st.floats(2.0**-30, 2.0**30, width=32),
    options=st.sampled_from(OPTIONS),
    weight=st.sampled_from([None, *HALVES]),
)
def test_any_masters_and_coefficients_give_the_bits_of_numpy(bits, coefficient, options, weight):
    rule, moments, numbers = options
    batch = make_batch(moments, weight, [len(bits)])
    batch.masters[0].copy_(torch.tensor(bits, dtype=torch.int32).view(FULL))
    both = twin(rule, batch)
    grads = make_grads(batch, weight or FULL, 3)
    both.step([grads], Hyper.of(numbers), coefficient=coefficient)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_every_remainder_of_a_chunk(kind):
    rule, moments, numbers = kind
    batch = make_batch(moments, HALF, LARGE)
    twin(rule, batch).step([make_grads(batch, HALF, 3)], Hyper.of(numbers))


def test_groups_have_their_own_numbers_and_batches_their_own_dtypes():
    groups = [0, 1, 1, 0, 1]
    sizes = [5, 300, 17, 1025, 64]
    batches = [
        make_batch(2, weight, sizes, groups=groups, seed=seed)
        for seed, weight in enumerate((*HALVES, None))
    ]
    both = twin("adam", *batches)
    hyper = Hyper((OPTIONS[0][2], OPTIONS[1][2]), (None, torch.tensor(0.25)))
    for step in range(2):
        grads = [make_grads(b, w, step) for b, w in zip(batches, (*HALVES, FULL), strict=True)]
        both.step(grads, hyper)


def test_gradients_of_different_dtypes_in_one_batch():
    batch = make_batch(2, HALF, [300, CHUNK + 3, 17, 2000])
    narrow, wide = make_grads(batch, HALF, 3), make_grads(batch, FULL, 9)
    twin("adam", batch).step([[narrow[0], wide[1], wide[2], narrow[3]]], Hyper.of(ADAMW))


def test_tensors_that_lie_in_any_order_and_anywhere():
    layouts = [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(2, 0, 3, 1),
        lambda t: t[1:2],
    ]
    flat = make_batch(2, HALF, [120] * 3)

    def laid(tensors):
        return [lay(t.view(4, 3, 5, 2)) for lay, t in zip(layouts, tensors, strict=True)]

    moments = [laid(moment) for moment in flat.moments]
    batch = Batch(laid(flat.masters), laid(flat.weights), moments, flat.steps, flat.groups)
    twin("adam", batch).step([make_grads(batch, HALF, 3)], Hyper.of(ADAMW))
    shifted = make_batch(2, HALF, [1001])
    parts = [shifted.masters, shifted.weights, *shifted.moments]
    masters, weights, *moments = [[part[0][1:]] for part in parts]
    odd = Batch(masters, weights, moments, shifted.steps, [0])
    plan = compiled.plan_update("adam", [odd])
    assert plan.parts[0].table.addresses[0] == masters[0].data_ptr()
    both = Twin("adam", [odd], "cpu", placed=[odd], backend=compiled)
    both.step([make_grads(odd, HALF, 3)], Hyper.of(ADAMW))


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_a_skipped_step_changes_nothing(options):
    rule, moments, numbers = options
    batch = make_batch(moments, HALF, SIZES, steps=0.0)
    both = twin(rule, batch)
    grads = make_grads(batch, HALF, 3)
    grads[3].fill_(torch.inf)
    both.step([grads], Hyper.of(numbers), found_inf=1)
    assert [step.item() for step in both.actual[0].steps] == [0.0] * len(SIZES)
    both.step([make_grads(batch, HALF, 3)], Hyper.of(numbers))


@pytest.mark.parametrize(("found_inf", "scale"), [(0, 1024.0), (1, 512.0)])
def test_the_scale_moves_in_every_step(found_inf, scale):
    batch, move = make_batch(0, HALF, [3]), Move.on("cpu")
    grads = [make_grads(batch, HALF, 3)]
    then = ScaleMove(**vars(move))
    twin("sgd", batch).step(grads, Hyper.of(OPTIONS[3][2]), found_inf=found_inf, then=then)
    assert move.scale.item() == scale


@pytest.fixture
def threads():
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("openmp", [True, False])
def test_the_number_of_threads_shows_in_no_bit(threads, monkeypatch, openmp):
    if not openmp:
        monkeypatch.setattr(_c_work, "_openmp", lambda: None)
    batch = make_batch(2, HALF, [5 * CHUNK + 11, 700, 2 * CHUNK])
    grads = make_grads(batch, HALF, 3)
    norms = set()
    for count in (1, 2, 3):
        threads(count)
        twin("adam", batch).step([grads], Hyper.of(ADAMW))
        norms.add(compiled.inspect(grads, torch.tensor(1.0), None).grad_norm.item())
    assert len(norms) == 1


def test_weights_that_go_around_the_caches_are_the_same(monkeypatch):
    monkeypatch.setattr(_c_update, "_STREAMING", 1)
    for weight in HALVES:
        batch = make_batch(2, weight, [*SIZES, CHUNK + 5])
        twin("adam", batch).step([make_grads(batch, weight, 3)], Hyper.of(ADAMW))
        # at an address that vectors cannot be stored to
        odd = torch.zeros(1001, dtype=weight)[1:]
        masters = [torch.linspace(-3, 3, 1000)]
        plan = compiled.plan_update("sgd", [Batch(masters, [odd], [], None, [0])])
        compiled.prepare_(plan, Hyper.of(PLAIN_SGD))
        nothing, go = [[torch.zeros(1000, dtype=weight)]], torch.tensor(0, dtype=torch.int32)
        compiled.update_(plan, nothing, torch.tensor(1.0), go, torch.tensor(0))
        assert_same_bits(odd, masters[0].to(weight))


@pytest.mark.parametrize("backend", [cpu, compiled], ids=["cpu", "compiled"])
def test_clamped_weights_are_counted_and_finite(backend):
    weight = torch.nn.Parameter(torch.full((10,), 65000.0).half())
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD([weight], lr=1000.0),
        mpcore.NoLossScale(),
        path="fused",
        backend="cpu" if backend is cpu else "compiled",
    )
    weight.grad = -torch.ones(10).half()
    optimizer.step()
    assert weight.tolist() == [65504.0] * 10
    assert optimizer.saturated == 10
    assert optimizer.state[weight]["master"].tolist() == [65992.0] * 10


def test_a_plan_is_prepared_for_one_update():
    batch = make_batch(0, HALF, [3])
    plan = compiled.plan_update("sgd", [batch])
    one, go = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    grads = [make_grads(batch, HALF, 1)]
    with pytest.raises(StageError, match="prepared"):
        compiled.update_(plan, grads, one, go, torch.tensor(0))
    compiled.prepare_(plan, Hyper.of(PLAIN_SGD))
    compiled.update_(plan, grads, one, go, torch.tensor(0))
    with pytest.raises(StageError, match="prepared"):
        compiled.update_(plan, grads, one, go, torch.tensor(0))


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.ones(3)], "expected one for each of 2 masters, got 1"),
        ([torch.ones(3), torch.ones(4)], r"grads\[1\]: expected \[5\] in float16.*got \[4\]"),
        ([torch.ones(3), torch.ones(5).double()], r"grads\[1\]: expected .*got \[5\] in .*float64"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_and_nothing_is_written(grads, message):
    batch = make_batch(2, HALF, [3, 5])
    both = twin("adam", batch)
    compiled.prepare_(both.plan, Hyper.of(ADAMW))
    with pytest.raises(ArgumentError, match=message):
        both.update([grads], 0.37)
    both.update([make_grads(batch, HALF, 3)], 0.37)  # still prepared
    both.follow([make_grads(batch, HALF, 3)], Hyper.of(ADAMW), 0.37)


def test_a_compiler_that_refuses_leaves_everything_as_it_was(monkeypatch):
    batch = make_batch(2, HALF, [3, 5])
    both = twin("adam", batch)
    compiled.prepare_(both.plan, Hyper.of(ADAMW))
    grads = make_grads(batch, HALF, 3)
    with monkeypatch.context() as patch:
        patch.setattr(_c_update, "passes", lambda: _c_compiler.load("nonsense, again"))
        with pytest.raises(BackendError, match="to compile"):
            both.update([grads], 0.37)
    both.update([grads], 0.37)
    both.follow([grads], Hyper.of(ADAMW), 0.37)


LEVELS = list(_c_command.levels(_c_command.platform.machine()).values())


@pytest.mark.parametrize("name", [name for name, _ in LEVELS])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_libraries_for_every_level_of_processors_give_the_same_bits(name, options, monkeypatch):
    best = _c_compiler.find_built()
    names = [known for known, _ in LEVELS]
    if best is None or names.index(name) < [known in best.name for known in names].index(True):
        pytest.skip("this processor does not have these instructions")
    path = best.with_name(f"passes-{name}-{_c_command.identity()}.so")
    library = ctypes.CDLL(str(path))
    monkeypatch.setattr(_c_update, "passes", lambda: library)
    rule, moments, numbers = options
    for grad, weight in COMBINATIONS:
        batch = make_batch(moments, weight, SIZES, steps=0.0)
        both = twin(rule, batch)
        for step in range(2):
            both.step([make_grads(batch, grad, 50 * step)], Hyper.of(numbers))
