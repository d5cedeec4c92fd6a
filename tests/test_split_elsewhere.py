"""What watches, averages and counts masters finds the same in split ones."""

import mpcore
import pytest
import torch
from mpcore.monitoring.memory import resident_bytes
from torch import nn
from torch.optim import swa_utils

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import PACKING, Engine
from mpcore_testing.stored import stored
from mpcore_testing.syncs import fake_cuda, steps_without_values

ENGINES = pytest.mark.parametrize("engine", PACKING, ids=str)
HALVES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


def both(engine, dtype):
    return [stored(engine, adamw, dtype, masters=m) for m in ("split", "float32")]


@HALVES
@ENGINES
def test_a_monitor_reads_the_same(engine, dtype):
    readings = []
    for one in both(engine, dtype):
        monitor = mpcore.Monitor(one.optimizer, every=1)
        for seed in range(3):
            one.step(seed, overflow=seed == 1)
            readings.append(monitor.reading)
    split, whole = readings[:3], readings[3:]
    for mine, theirs in zip(split, whole, strict=True):
        assert mine.lost_updates == theirs.lost_updates
        assert mine.findings == theirs.findings
        assert mine.saturated == theirs.saturated
    assert split[2].lost_updates is not None


@ENGINES
def test_masters_beyond_the_largest_weight_become_it_and_count(engine):
    weight = nn.Parameter(torch.full((3,), 65504.0).half())
    sgd = torch.optim.SGD([weight], lr=1.0)
    optimizer = engine.wrap(sgd, mpcore.NoLossScale(), masters="split")
    weight.grad = torch.tensor([-40.0, 0.0, 40.0]).half()
    optimizer.step()
    assert optimizer.saturated == 1
    assert optimizer.float32_state(weight)["master"].tolist() == [65504.0, 65504.0, 65464.0]


@HALVES
@ENGINES
def test_an_average_is_that_of_float32_masters(engine, dtype):
    found = []
    for one in both(engine, dtype):
        model = nn.ParameterList(one.params)
        ema = swa_utils.get_ema_multi_avg_fn(0.9995)
        average = mpcore.AveragedModel(model, one.optimizer, multi_avg_fn=ema)
        for seed in range(4):
            one.step(seed)
            average.update_parameters(model)
        found.append(average.float32_state_dict())
        weights = [param.detach().clone() for param in one.params]
        states = one.states()
        with average.applied_to(model):
            assert not same_bits([param.detach() for param in one.params], weights)
        assert same_bits(one.states(), states)
    assert same_bits(*found)


@HALVES
@ENGINES
def test_bytes_are_counted_as_they_lie(engine, dtype):
    weight = nn.Parameter(torch.randn(64, 32).to(dtype))
    for masters, per_parameter in (("split", 14.0), ("float32", 16.0)):
        optimizer = engine.wrap(adamw([weight]), mpcore.NoLossScale(), masters=masters)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        resident = resident_bytes(optimizer)
        assert resident.per_parameter == per_parameter
        assert resident.masters == weight.numel() * (per_parameter - 12)
        del optimizer


@HALVES
@pytest.mark.parametrize("way", ["step", "clip", "unscale"])
def test_a_step_waits_for_nothing(way, dtype):
    with fake_cuda() as watch:
        params = [nn.Parameter(torch.empty(n, 3, device="cuda", dtype=dtype)) for n in (2, 5)]
        inner = torch.optim.AdamW(params, fused=True)
        optimizer = Engine("reference", "general").wrap(inner, masters="split")
        optimizer.adopt_masters([(params[0], torch.empty(2, 3, device="cuda"))])
        steps_without_values(optimizer, params, way, drops_one=True)
    assert watch.operations > 100
    assert watch.reads == 0
