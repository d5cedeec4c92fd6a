"""The wrapper in a loop that torch.amp.GradScaler drives."""

from __future__ import annotations

from typing import Any

import mpcore
import numpy as np
import pytest
import torch
from mpcore.errors import StageError
from torch import Tensor, nn

from mpcore_testing.engines import GENERAL, Engine, engine_cases

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MIXTURES = [[torch.float16], [torch.bfloat16], [torch.float32], DTYPES]
OVERFLOWS = (2, 3, 7)

INNERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


def weights(dtypes: Any) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 2, 6).to(dtype)) for dtype in dtypes]


def loss_of(params: list[nn.Parameter], step: int) -> Tensor:
    noise = torch.randn(6, generator=torch.Generator().manual_seed(step))
    return torch.stack([(p.float() * noise).sum() for p in params]).sum()


def patterns(tensor: Tensor) -> Any:
    return str(tensor.dtype), tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(params: list[nn.Parameter], optimizer: Any) -> Any:
    found = []
    for param in params:
        state = optimizer.state.get(param, {})
        found.append((patterns(param), {k: patterns(v) for k, v in state.items()}))
    return found, optimizer.loss_scale


def unscaled(param: nn.Parameter, scale: float) -> Tensor:
    """A gradient times the float32 reciprocal of the scale, in NumPy, as float32."""
    factor = np.float32(1.0 / np.float64(np.float32(scale)))
    return torch.from_numpy(param.grad.float().numpy() * factor)


@pytest.mark.parametrize("init_scale", [2.0**8, 1000.0])
@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_a_grad_scaler_loop_trains_as_float32_copies_that_skip_the_same_steps(
    engine: Engine, name: str, dtypes: Any, init_scale: float
) -> None:
    params = weights(dtypes)
    copies = [nn.Parameter(p.detach().float().clone()) for p in params]
    optimizer, reference = (
        engine.wrap(INNERS[name](params)),
        INNERS[name](copies),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    for step in range(12):
        scale = scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step)).backward()
        if step in OVERFLOWS:
            params[-1].grad[1] = torch.inf if step % 2 else torch.nan
        for param, twin in zip(params, copies, strict=True):
            twin.grad = unscaled(param, scale)
        before = contents(params, optimizer) if step > 2 else None
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.last_step.skipped == (step in OVERFLOWS)
        assert optimizer.last_step.loss_scale == scale
        if step in OVERFLOWS:
            assert before is None or contents(params, optimizer) == before
            assert scaler.get_scale() == scale / 2
        else:
            reference.step()
        for param, twin in zip(params, copies, strict=True):
            master = optimizer.state[param].get("master", param)
            assert engine.agree(master, twin, steps=step + 1), step
            assert patterns(param) == patterns(master.to(param.dtype))
    assert (optimizer.steps, optimizer.skipped_steps) == (12, len(OVERFLOWS))
    assert optimizer.loss_scale == 2.0**16, "its own scale moved although it was not used"
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_a_grad_scaler_loop_equals_the_engines_own_loop(
    engine: Engine, name: str, dtypes: Any
) -> None:
    params, others = weights(dtypes), weights(dtypes)
    optimizer = engine.wrap(INNERS[name](params))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=2)
    own = mpcore.DynamicLossScale(2.0**15, growth_interval=2, min_scale=2.0**-20)
    other = engine.wrap(INNERS[name](others), own)
    for step in range(12):
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        other.backward(loss_of(others, step))
        other.step()
        assert scaler.get_scale() == other.loss_scale
        assert contents(params, optimizer)[0] == contents(others, other)[0]
    assert optimizer.skipped_steps == other.skipped_steps
    assert (optimizer.skipped_steps > 0) == (torch.float16 in dtypes)


@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
def test_unscaling_and_clipping_by_torch_before_the_step(engine: Engine, name: str) -> None:
    params = weights([torch.float32])
    copies = weights([torch.float32])
    optimizer, reference = (
        engine.wrap(INNERS[name](params)),
        INNERS[name](copies),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(params, step) * (torch.inf if step == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        copies[0].grad = params[0].grad.clone()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            reference.step()
        assert engine.agree(params[0], copies[0], steps=step + 1)
    assert optimizer.skipped_steps == 1
    assert optimizer.last_step.loss_scale == 1.0


def test_torch_refuses_to_unscale_float16_gradients_and_nothing_has_changed(engine: Engine) -> None:
    params = weights(DTYPES)
    optimizer = engine.wrap(INNERS["SGD"](params))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(params, 0)).backward()
    before = contents(params, optimizer), [patterns(p.grad) for p in params]
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(optimizer)
    assert (contents(params, optimizer), [patterns(p.grad) for p in params]) == before


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, 0.25, 8.0, torch.inf, torch.nan])
@pytest.mark.parametrize(("name", "engine"), engine_cases(INNERS))
@pytest.mark.parametrize("shape", [(), (1,)])
def test_any_non_zero_found_inf_skips(
    engine: Engine, name: str, found_inf: float, shape: Any
) -> None:
    params = [*weights(DTYPES), nn.Parameter(torch.tensor(1.0).half())]
    optimizer = engine.wrap(INNERS[name](params))
    for step in range(2):
        optimizer.grad_scale = torch.full(shape, 4.0)
        optimizer.found_inf = torch.full(shape, found_inf if step else 0.0)
        before = contents(params, optimizer)[0]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert optimizer.last_step.skipped == (found_inf != 0)
    assert (contents(params, optimizer)[0] == before) == (found_inf != 0)


def test_the_outside_scalers_flag_is_read_before_the_gradients_are_trusted(engine: Engine) -> None:
    params = weights([torch.float16])
    optimizer = engine.wrap(INNERS["SGD"](params))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    params[0].grad = torch.full_like(params[0], torch.inf)
    optimizer.step()
    assert optimizer.last_step.skipped
    assert optimizer.last_step.overflowed() == ["group 0, parameter 0, [6]"]


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
def test_two_scalers_at_once_are_refused_and_nothing_changes(engine: Engine, name: str) -> None:
    params = weights(DTYPES)
    optimizer = engine.wrap(INNERS[name](params))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(optimizer.scale(loss_of(params, 0) * 2.0**-20)).backward()
    before = contents(params, optimizer), [patterns(p.grad) for p in params]
    with pytest.raises(StageError, match=r"^step\(\): expected one scaler, got two: .*Use one"):
        scaler.step(optimizer)
    assert (contents(params, optimizer), [patterns(p.grad) for p in params]) == before
    assert optimizer.steps == 0


def test_two_optimizers_under_one_scaler_skip_each_on_its_own_gradients(engine: Engine) -> None:
    params = [weights([dtype]) for dtype in DTYPES[:2]]
    optimizers = [engine.wrap(INNERS["SGD"](given)) for given in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    loss = loss_of(params[0], 0) * torch.inf + loss_of(params[1], 1)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [optimizer.last_step.skipped for optimizer in optimizers] == [True, False]
    assert scaler.get_scale() == 2.0**7


def test_autocast_over_float32_weights_trains_under_a_grad_scaler() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1))
    other = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1))
    other.load_state_dict(model.state_dict())
    wrapped = GENERAL.wrap(INNERS["AdamW"](model.parameters()))
    plain = INNERS["AdamW"](other.parameters())
    for module, optimizer in ((model, wrapped), (other, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(5):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = module(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert patterns(mine) == patterns(theirs)


def test_a_step_that_fails_leaves_nothing_of_the_scaler_behind(engine: Engine) -> None:
    for kind in (torch.amp.GradScaler, mpcore.GradScaler):
        param = torch.nn.Parameter(torch.zeros(2).half())
        optimizer = engine.wrap(torch.optim.SGD([param], lr=1.0), mpcore.NoLossScale())
        scaler = kind("cpu", init_scale=8.0)
        scaler.scale(param.float().sum()).backward()
        optimizer.accumulate()
        scaler.scale(param.float().sum()).backward()
        with pytest.raises(mpcore.StageError, match=r"accumulate\(\) has unscaled"):
            scaler.step(optimizer)
        optimizer.zero_grad()
        scaler = kind("cpu", init_scale=8.0)
        scaler.scale(param.float().sum()).backward()
        scaler.step(optimizer)
        assert param.tolist() == [-1.0, -1.0]
