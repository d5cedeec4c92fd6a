"""The kernels' contracts on a real device, and what only a device can show."""

import pytest
import torch

from mpcore_kernels import cast_into, unscale_, unscale_into
from mpcore_kernels._table import CHUNK
from mpcore_testing.gpu import DEVICE, many, no_sync
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    all_patterns,
    assert_same_bits,
    flags,
    guarded,
    random_bits,
    rounding_boundaries,
)
from mpcore_testing.marks import needs_a_gpu

pytestmark = pytest.mark.gpu


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("coefficient", [2.0**-24, 2.0**-16, 0.37, 1.0, 2.0**16])
@pytest.mark.parametrize("dtype", HALVES)
def test_unscale_multiplies_all_65536_patterns_on_the_device_as_on_the_cpu(dtype, coefficient):
    values = all_patterns(dtype)
    product = values.float() * torch.tensor(coefficient)
    grad, nonfinite = values.to(DEVICE), flags(1, DEVICE)
    out = torch.empty_like(grad, dtype=torch.float32)
    unscale_into([grad], [out], scalar(coefficient), nonfinite)
    assert_same_bits(out, product)
    unscale_([grad], scalar(coefficient), nonfinite)
    assert_same_bits(grad, product.to(dtype))
    assert nonfinite.tolist() == [1]


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_rounds_and_clamps_on_the_device_as_on_the_cpu(dtype):
    master = torch.cat(
        [rounding_boundaries(), random_bits(many(10**6, 10**5), torch.float32, seed=0)]
    )
    rounded = master.to(dtype)
    clamped = rounded.isinf() & master.isfinite()
    weight = torch.empty_like(master, dtype=dtype, device=DEVICE)
    saturated = scalar(0, torch.int64)
    cast_into([master.to(DEVICE)], [weight], scalar(0, torch.int32), saturated)
    largest = (master.sign() * torch.finfo(dtype).max).to(dtype)
    assert_same_bits(weight, torch.where(clamped, largest, rounded))
    assert saturated.item() == clamped.sum().item()
    cast_into([master.to(DEVICE)], [weight.zero_()], scalar(1, torch.int32), saturated)
    assert not weight.any()


def test_many_tensors_at_any_alignment_are_written_and_nothing_around_them():
    sizes = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3] * many(6, 1)
    values = [random_bits(n, FLOATS[i % 3], seed=i) for i, n in enumerate(sizes)]
    placed = [guarded(v, DEVICE, offset=i % 9) for i, v in enumerate(values)]
    nonfinite = flags(len(values), DEVICE)
    unscale_([p.tensor for p in placed], scalar(0.25), nonfinite)
    expected = [(v.float() * 0.25).to(v.dtype) for v in values]
    for p, e in zip(placed, expected, strict=True):
        assert_same_bits(p.tensor, e)
        p.assert_margins_intact()
    assert nonfinite.tolist() == [int(not e.isfinite().all()) for e in expected]


def test_launchers_never_wait_for_the_device():
    master = torch.ones(3 * CHUNK, device=DEVICE)
    weight, out = master.half(), torch.empty_like(master)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    coefficient = torch.ones((), device=DEVICE)
    found_inf = torch.zeros((), dtype=torch.int32, device=DEVICE)
    saturated = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with no_sync():
        unscale_([weight], coefficient, nonfinite)
        unscale_into([weight], [out], coefficient, nonfinite)
        cast_into([master], [weight], found_inf, saturated)


@needs_a_gpu
def test_launches_run_on_the_current_stream():
    grads = [torch.zeros(2**24, device=DEVICE) for _ in range(4)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for grad in grads:
            grad.fill_(2.0)
        unscale_(grads, torch.full((), 0.5, device=DEVICE), flags(4, DEVICE))
    stream.synchronize()
    assert all((grad == 1.0).all() for grad in grads)


@needs_a_gpu
def test_tensors_beyond_two_to_the_31_elements_are_reached_to_the_last():
    size = 2**31 + CHUNK + 1
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("not enough device memory")
    grad = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    nonfinite = flags(1, DEVICE)
    places = torch.tensor([0, 2**31 - 1, 2**31, size - 1], device=DEVICE)
    grad[places] = 2.0
    unscale_([grad], scalar(0.5), nonfinite)
    assert grad[places].tolist() == [1.0] * 4
    assert grad.count_nonzero().item() == 4
    assert nonfinite.tolist() == [0]
    grad[-1] = float("nan")
    unscale_([grad], scalar(0.5), nonfinite)
    assert nonfinite.tolist() == [1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second device")
def test_launches_follow_the_tensors_to_a_device_that_is_not_the_current_one():
    grad = torch.full((CHUNK + 1,), 2.0, device="cuda:1")
    coefficient = torch.tensor(0.5, device="cuda:1")
    unscale_([grad], coefficient, flags(1, "cuda:1"))
    assert (grad == 1.0).all()
    assert torch.cuda.current_device() == 0
