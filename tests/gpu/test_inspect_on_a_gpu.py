"""inspect and update_scale_ on a real device: the same bits as the reference."""

import pytest
import torch
from mpcore.backends import reference
from mpcore.loss_scale import DynamicLossScale, initial_state, next_state
from mpcore.loss_scale.tensors import LossScaleTensors

import mpcore_kernels
from mpcore_kernels import inspect, update_scale_
from mpcore_kernels._table import CHUNK
from mpcore_testing.batches import Move
from mpcore_testing.gpu import DEVICE, many, no_sync
from mpcore_testing.inspections import assert_inspection, assert_same_inspection
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    all_patterns,
    assert_same_bits,
    guarded,
    random_bits,
    random_finite,
)
from mpcore_testing.marks import needs_a_gpu

pytestmark = pytest.mark.gpu


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("coefficient", [2.0**-24, 0.37, 1.0, 2.0**24])
@pytest.mark.parametrize("dtype", HALVES)
def test_inspect_of_all_65536_patterns_is_that_of_the_cpu(dtype, coefficient):
    patterns = all_patterns(dtype)
    values = [patterns, patterns[patterns.isfinite()]]
    found = inspect([v.to(DEVICE) for v in values], scalar(coefficient), 1.0, statistics=True)
    expected = reference.inspect(values, torch.tensor(coefficient), 1.0, statistics=True)
    assert_same_inspection(found, expected)
    assert_inspection(found, values, coefficient)


@pytest.mark.parametrize("make", [random_bits, random_finite])
def test_inspect_of_many_tensors_at_any_alignment_is_that_of_the_cpu(make):
    sizes = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, many(70, 2) * CHUNK]
    sizes *= many(6, 1)
    values = [make(n, FLOATS[i % 3], seed=i) for i, n in enumerate(sizes)]
    placed = [guarded(v, DEVICE, offset=i % 9) for i, v in enumerate(values)]
    for coefficient in (0.37, 2.0**-30, 2.0**80, float("inf")):
        found = inspect([p.tensor for p in placed], scalar(coefficient), 1.0, statistics=True)
        expected = reference.inspect(values, torch.tensor(coefficient), 1.0, statistics=True)
        assert_same_inspection(found, expected)
    for p, v in zip(placed, values, strict=True):
        p.assert_margins_intact()
        assert_same_bits(p.tensor, v)


def test_inspect_gives_the_same_bits_every_time():
    grads = [
        random_finite(many(10**6, 10**4) + i, FLOATS[i % 3], seed=i).to(DEVICE) for i in range(6)
    ]
    first = inspect(grads, scalar(0.37), 1.0, statistics=True)
    for _ in range(many(50, 3)):
        assert_same_inspection(inspect(grads, scalar(0.37), 1.0, statistics=True), first)


def test_inspect_takes_20000_tensors():
    count = many(20_000, 100)
    values = [torch.full((1 + i % 3,), 1.0 + i % 7, dtype=FLOATS[i % 3]) for i in range(count)]
    values[-1][0] = torch.nan
    found = inspect([value.to(DEVICE) for value in values], scalar(1.0), None)
    assert found.kinds.tolist() == [0] * (count - 1) + [1]
    sums = [v.double().square().sum().item() for v in values[:-1]]
    assert found.square_sum[:-1].tolist() == sums


@needs_a_gpu
def test_inspect_reaches_tensors_beyond_two_to_the_31_elements_to_the_last():
    size = 2**31 + CHUNK + 1
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("not enough device memory")
    grad = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    grad[[0, 2**31 - 1, 2**31, size - 1]] = 2.0
    assert inspect([grad], scalar(0.5), None).grad_norm.item() == 2.0
    grad[-1] = float("nan")
    found = inspect([grad], scalar(0.5), None)
    assert (found.kinds.item(), found.first_bad.item()) == (1, size - 1)


def test_update_scale_follows_the_specification_on_the_device():
    loss_scale = DynamicLossScale(init=8.0, growth_interval=2, max_scale=16.0, hysteresis=2)
    state = initial_state(loss_scale)
    tensors = LossScaleTensors.from_state(state, DEVICE)
    move = loss_scale.move(tensors)
    for found_inf in [0, 0, 0, 0, 1, 1, 1, 0, 0, -1, 0, 1, 1, 1, 1, 1]:
        update_scale_(move, scalar(found_inf, torch.int32))
        state = next_state(loss_scale, state, found_inf=found_inf != 0)
        assert tensors.to_state() == state


@pytest.mark.parametrize("backend", [mpcore_kernels, mpcore_kernels.Launcher()])
def test_inspect_and_update_never_wait_for_the_device(backend):
    half = torch.ones(3 * CHUNK, device=DEVICE).half()
    master, one = half.float(), torch.ones((), device=DEVICE)
    move = Move.on(DEVICE)
    with no_sync():
        for _ in range(3):
            found = backend.inspect([half, master], one, 1.0, statistics=True)
            backend.update_scale_(move, found.found_inf)


@needs_a_gpu
def test_launcher_finds_its_tables_on_every_stream():
    launcher, grads = mpcore_kernels.Launcher(), [torch.ones(CHUNK + 1, device=DEVICE)]
    one = scalar(1.0)
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            for _ in range(2):
                found = launcher.inspect(grads, one, None)
            stream.synchronize()
            assert found.square_sum.item() == CHUNK + 1
