"""What the demo's tables count: lost updates and resident bytes."""

from __future__ import annotations

import mpcore
import numpy as np
import pytest
import torch
from mpcore.demo import regimes
from mpcore.demo.measure import SubnormalTally, UpdateTally, count_lost
from mpcore.demo.regimes import AdamWSettings, prepare
from mpcore.monitoring.memory import accumulators, resident_bytes

ADAMW = AdamWSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
# weights 4 x 3 and 4 in 16 bits where the regime has them, two norm vectors of 4 in FP32
PARAMETERS, SIXTEEN_BIT, NORM = 24, 16, 8


def stepped(regime, weight_decay=0.0):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.nn.init.constant_(model[0].weight, 0.5)
    settings = AdamWSettings(ADAMW.lr, ADAMW.betas, ADAMW.eps, weight_decay)
    model, engine = prepare(model, regime, settings, mpcore.DynamicLossScale(init=2.0))
    inputs = torch.arange(6.0).reshape(2, 3).to(regime.weights)
    engine.backward((model(inputs).float() * torch.arange(4.0)).sum())
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_count_lost_agrees_with_numpy(dtype, weight_decay):
    rng = np.random.default_rng(0)
    before = torch.from_numpy(rng.choice([0.0, 1.0, 2.0], 1000)).to(dtype)
    after = torch.from_numpy(rng.choice([0.0, 1.0, 2.0], 1000)).to(dtype)
    momentum = torch.from_numpy(rng.choice([0.0, 1e-12], 1000)).float()
    old, new, first = (tensor.double().numpy() for tensor in (before, after, momentum))
    moved = [m != 0 or (weight_decay != 0 and w != 0) for m, w in zip(first, old, strict=True)]
    lost = [m and a == b for m, a, b in zip(moved, old, new, strict=True)]
    assert count_lost(before, after, momentum, weight_decay) == (sum(lost), sum(moved))


def test_tally_counts_what_bfloat16_rounding_swallows():
    # an AdamW step of lr on a weight of 1: BF16 neighbours of 1 are 2^-8 below and 2^-7 above
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    for lr, lost in ((2.0**-10, 4), (2.0**-7, 0)):
        optimizer = regimes.RoundedAdamW([weight], lr, (0.9, 0.95), 1e-8, 0.0, mpcore.NoLossScale())
        optimizer.backward(weight.float().sum())
        tally = UpdateTally(optimizer)
        assert tally.step() is False
        assert (tally.lost, tally.updates) == (lost, 4)
        assert tally.fraction == lost / 4


def test_tally_counts_nothing_on_a_skipped_step():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.AdamW([weight]))
    optimizer.backward((weight.float() * torch.inf).sum())
    tally = UpdateTally(optimizer)
    assert tally.step() is True
    assert (tally.lost, tally.updates, tally.fraction) == (0, 0, 0.0)


def test_tally_watches_the_masters_where_there_are_some():
    engine = stepped(regimes.BF16_MASTERS)
    tally = UpdateTally(engine)
    tally.step()
    watched = [accumulator for _, accumulator in accumulators(engine)]
    assert {tensor.dtype for tensor in watched} == {torch.float32}
    # 1e-3 on weights of 0.5: FP32 keeps every one, BF16 (2^-10 = 0.00098 is half a place) none
    assert tally.lost == 0
    assert tally.updates > 0


@pytest.mark.parametrize(
    ("regime", "weights", "masters"),
    [
        (regimes.FP32, 4 * PARAMETERS, 0),
        (regimes.AUTOCAST, 4 * PARAMETERS, 0),
        (regimes.FP16_MASTERS, 2 * SIXTEEN_BIT + 4 * NORM, 4 * SIXTEEN_BIT),
        (regimes.BF16_MASTERS, 2 * SIXTEEN_BIT + 4 * NORM, 4 * SIXTEEN_BIT),
        (regimes.FP16_ROUNDED, 2 * SIXTEEN_BIT + 4 * NORM, 0),
        (regimes.BF16_ROUNDED, 2 * SIXTEEN_BIT + 4 * NORM, 0),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_resident_bytes_are_those_counted_by_hand(regime, weights, masters):
    engine = stepped(regime)
    engine.step()
    resident = resident_bytes(engine)
    assert resident.parameters == PARAMETERS
    assert resident.weights == weights
    assert resident.gradients == weights
    assert resident.masters == masters
    assert resident.moments == 8 * PARAMETERS
    assert resident.total == 2 * weights + masters + 8 * PARAMETERS
    assert resident.per_parameter == resident.total / PARAMETERS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subnormal_tally_agrees_with_an_exhaustive_table(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = torch.nn.Parameter(bits.view(dtype).clone())
    weight.grad = bits.view(dtype)
    tally = SubnormalTally()
    tally.count([weight, torch.nn.Parameter(torch.ones(2))])
    fraction = {torch.float16: 10, torch.bfloat16: 7}[dtype]  # bits of the fraction, two signs
    assert (tally.subnormal, tally.values) == (2 * (2**fraction - 1), 2**16)


def test_subnormal_tally_of_float32_gradients_says_nothing():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full_like(weight, 1e-40)
    tally = SubnormalTally()
    tally.count([weight])
    assert tally.fraction is None
