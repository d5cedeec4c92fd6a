"""The precision regimes: same start, and no handicap beyond the one they are named after."""

from __future__ import annotations

import mpcore
import pytest
import torch
from mpcore.demo import regimes
from mpcore.demo.model import GPT, GPTConfig
from mpcore.demo.regimes import AdamWSettings, prepare
from mpcore.demo.rounded import RoundedAdamW

CONFIG = GPTConfig(vocabulary=128, context=8, width=16, heads=2, layers=1)
ADAMW = AdamWSettings(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
HALF = [torch.float16, torch.bfloat16]


def prepared(regime):
    return prepare(GPT(CONFIG, seed=0), regime, ADAMW, mpcore.DynamicLossScale(init=2.0**10))


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("regime", regimes.GPT_REGIMES, ids=lambda regime: regime.key)
def test_regime_starts_from_the_rounded_weights_of_fp32(regime):
    model, engine = prepared(regime)
    originals = dict(GPT(CONFIG, seed=0).named_parameters())
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name
        assert parameter.dtype == (torch.float32 if is_norm else regime.weights)
        assert torch.equal(parameter, originals[name].to(parameter.dtype))
        master = engine.state.get(parameter, {}).get("master")
        assert (master is not None) == (regime.keeps_masters and not is_norm)
        if master is not None:
            assert torch.equal(master, originals[name])


@pytest.mark.parametrize("regime", regimes.GPT_REGIMES, ids=lambda regime: regime.key)
def test_regime_scales_the_loss_only_if_it_says_so(regime):
    _, engine = prepared(regime)
    shared = 2.0**10 if regime.own_scale is None else regime.own_scale.init
    assert engine.loss_scale == (shared if regime.scaled else 1.0)


def test_fp32_regime_is_the_plain_torch_optimizer():
    _, engine = prepared(regimes.FP32)
    assert isinstance(engine, torch.optim.AdamW)
    assert not isinstance(engine, mpcore.MixedPrecisionOptimizer)


def test_every_regime_uses_the_same_adamw_settings():
    for regime in regimes.GPT_REGIMES:
        (group,) = prepared(regime)[1].param_groups
        settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        assert settings == (1e-2, (0.9, 0.95), 1e-8, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_rounded_adamw_is_torch_adamw_with_the_weight_rounded_after_each_step(dtype):
    start = random(40, 30, seed=0).to(dtype)
    weight, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizer = RoundedAdamW([weight], 1e-2, (0.9, 0.95), 1e-8, 0.1, mpcore.NoLossScale())
    oracle = torch.optim.AdamW(
        [wide], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(10):
        weight.grad = random(40, 30, seed=step + 1).to(dtype)
        wide.grad = weight.grad.float()
        optimizer.step()
        oracle.step()
        with torch.no_grad():
            wide.copy_(wide.to(dtype))
        assert torch.equal(weight.float(), wide)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


def test_rounded_adamw_unscales_what_it_scaled():
    moments = []
    for rule in (mpcore.NoLossScale(), mpcore.StaticLossScale(256.0)):
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
        optimizer = RoundedAdamW([weight], 1e-2, (0.9, 0.95), 1e-3, 0.0, rule)
        optimizer.backward((weight.float() * torch.arange(8)).sum())
        optimizer.step()
        moments.append(optimizer.state[weight]["exp_avg"])
    # small integers times a power of two: exact in FP16
    assert torch.equal(moments[0], moments[1])
    assert moments[0].any()


def test_rounded_adamw_skips_an_overflow_and_backs_off():
    first, second = (torch.nn.Parameter(torch.ones(3, dtype=torch.float16)) for _ in range(2))
    rule = mpcore.DynamicLossScale(init=2.0**10)
    optimizer = RoundedAdamW([first, second], 1e-2, (0.9, 0.95), 1e-8, 0.1, rule)
    optimizer.backward((first.float() + second.float() * 100).sum())
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.loss_scale == 2.0**9
    assert torch.equal(first, torch.ones(3, dtype=torch.float16))
    assert not optimizer.state
