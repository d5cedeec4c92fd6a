"""Hooks, and what the general path does with optimizers of its own: found_inf, float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mpcore
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from mpcore_testing.engines import GENERAL, Engine
from mpcore_testing.syncs import ScalarReads

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=3)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 4).to(dtype)) for dtype in (torch.float16, torch.float32)]


def loss_of(params: list[nn.Parameter]) -> torch.Tensor:
    return torch.stack([(p.float() * 0.5).sum() for p in params]).sum()


def test_hooks_fire_once_a_step_on_the_wrapper_and_once_a_taken_step_on_the_inner(
    engine: Engine,
) -> None:
    params = weights()
    optimizer = engine.wrap(torch.optim.SGD(params, lr=0.1), SCALE)
    seen: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: seen.update([name])

    skipped: list[bool] = []
    if not engine.fused:  # hooks of its own ask for its own step
        optimizer.inner.register_step_post_hook(count("inner"))
    handles = [
        optimizer.register_step_post_hook(lambda o, *_: skipped.append(o.last_step.skipped)),
        optimizer.register_step_pre_hook(count("pre")),
        optimizer.register_step_post_hook(count("post")),
        torch_optimizer.register_optimizer_step_pre_hook(count("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(count("global post")),
    ]
    try:
        for factor in (1.0, torch.inf, 1.0):
            optimizer.zero_grad()
            optimizer.backward(loss_of(params) * factor)
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert skipped == [False, True, False]
    # global hooks see the wrapper three times, and the inner one where it is stepped: twice
    inner = 0 if engine.fused else 2
    expected = {"pre": 3, "post": 3, "inner": inner, "global pre": 3 + inner}
    assert seen == Counter({**expected, "global post": 3 + inner})


def test_a_step_with_a_fused_inner_syncs_not_at_all_until_its_result_is_read() -> None:
    params, plain = weights(), [nn.Parameter(p.detach().float()) for p in weights()]
    optimizer = GENERAL.wrap(torch.optim.AdamW(params, fused=True), SCALE)
    theirs = torch.optim.AdamW(plain, fused=True)
    for _ in range(2):
        optimizer.backward(loss_of(params))
        for param, copy in zip(params, plain, strict=True):
            copy.grad = param.grad.float() / 256
        with ScalarReads() as alone:
            theirs.step()
        with ScalarReads() as ours:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            result = optimizer.last_step
            optimizer.zero_grad()
        assert ours.count == alone.count
        assert not hasattr(optimizer.inner, "found_inf")
    for read in (lambda: result.skipped, lambda: result.grad_norm, lambda: result.loss_scale):
        with ScalarReads() as reading:
            read()
        assert reading.count == 1


def test_float64_gradients_whose_norm_overflows_skip_the_step_instead_of_escaping_the_clip() -> (
    None
):
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = GENERAL.wrap(torch.optim.SGD([weight], lr=1.0), mpcore.NoLossScale())
    weight.grad = torch.tensor([1e200, 0.0], dtype=torch.float64)
    assert optimizer.clip_grad_norm_(1.0).isinf()
    optimizer.step()
    assert optimizer.last_step.skipped
    assert weight.tolist() == [0.0, 0.0]
