"""Training that began elsewhere goes on here, and the other way round."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import mpcore
import pytest
import torch
from mpcore import migration
from torch import nn

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import Engine

GENERAL = Engine("reference", "general")
KINDS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    "AMSGrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]


def full_params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 6 + i).reshape(-1, 1)) for i in range(3)]


def halved(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Two 16-bit copies, and one that stays float32 as norms do."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return [nn.Parameter(p.detach().to(d)) for p, d in zip(params, dtypes, strict=True)]


def gradients(params: list[nn.Parameter], seed: int) -> list[torch.Tensor]:
    """Gradients that 16 bits hold exactly, scaled by up to 2^8 too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [param.shape for param in params]
    return [torch.randint(-16, 17, shape, generator=generator) / 64 for shape in shapes]


def step_torch(optimizer: Any, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        for param, grad in zip(params, gradients(params, seed), strict=True):
            param.grad = grad.clone()
        optimizer.step()


def step_ours(optimizer: Any, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        optimizer.scale(torch.ones(()))
        for param, grad in zip(params, gradients(params, seed), strict=True):
            param.grad = (grad * optimizer.loss_scale).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def masters_of(optimizer: Any, params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [optimizer.state[p].get("master", p).detach() for p in params]


def reloaded(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@kinds
def test_amp_training_goes_on_bit_for_bit(kind: str) -> None:
    params = full_params()
    theirs = KINDS[kind](groups_of(params))
    step_torch(theirs, params, range(3))
    saved, masters = copy.deepcopy(theirs.state_dict()), [p.detach().clone() for p in params]
    scaler = torch.amp.GradScaler("cpu").state_dict() | {"scale": 100.0, "_growth_tracker": 7}
    mine = halved(params)
    optimizer = GENERAL.wrap(KINDS[kind](groups_of(mine)))
    optimizer.load_state_dict(
        reloaded(migration.from_torch(optimizer, saved, masters=masters, scaler=scaler))
    )
    assert optimizer.loss_scale == 64.0
    assert optimizer.state_dict()["mpcore"]["loss_scale"]["growth_tracker"] == 7
    assert same_bits(masters_of(optimizer, mine), masters)
    step_torch(theirs, params, range(3, 6))
    step_ours(optimizer, mine, range(3, 6))
    assert same_bits(masters_of(optimizer, mine), [p.detach() for p in params])


@kinds
def test_and_back_bit_for_bit(kind: str, engine: Engine) -> None:
    if engine.fused and kind == "RMSprop":
        pytest.skip("it has no fused update")
    mine = halved(full_params())
    optimizer = engine.wrap(KINDS[kind](groups_of(mine)))
    step_ours(optimizer, mine, range(3))
    params = [nn.Parameter(m.clone()) for m in masters_of(optimizer, mine)]
    theirs = KINDS[kind](groups_of(params))
    theirs.load_state_dict(reloaded(migration.to_torch(optimizer)))
    general = GENERAL.wrap(KINDS[kind](groups_of(halved(params))))
    copies = [p for group in general.param_groups for p in group["params"]]
    general.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for param, source in zip(copies, mine, strict=True):
            param.copy_(source)
    step_torch(theirs, params, range(3, 6))
    step_ours(general, copies, range(3, 6))
    assert same_bits(masters_of(general, copies), [p.detach() for p in params])


def test_without_masters_they_come_from_the_weights() -> None:
    params = full_params()
    theirs = KINDS["AdamW"](groups_of(params))
    step_torch(theirs, params, range(2))
    mine = halved(params)
    optimizer = GENERAL.wrap(KINDS["AdamW"](groups_of(mine)))
    optimizer.load_state_dict(migration.from_torch(optimizer, theirs.state_dict()))
    step_ours(optimizer, mine, range(2, 3))
    assert [optimizer.state[p]["exp_avg"].dtype for p in mine] == [torch.float32] * 3
    twin = [nn.Parameter(p.detach().to(h.dtype).float()) for p, h in zip(params, mine, strict=True)]
    plain = KINDS["AdamW"](groups_of(twin))
    plain.load_state_dict(theirs.state_dict())
    step_torch(plain, twin, range(2, 3))
    assert same_bits(masters_of(optimizer, mine), [p.detach() for p in twin])


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.0, 1.0), (float("inf"), 2.0**24), (3.0, 2.0), (2.0**16, 2.0**16), (None, 2.0**16)],
)
def test_any_scale_becomes_a_power_of_two_within_the_bounds(scale: Any, expected: float) -> None:
    params = halved(full_params())
    optimizer = GENERAL.wrap(KINDS["SGD"](params))
    scaler = {} if scale is None else {"scale": scale, "_growth_tracker": 3}
    saved = KINDS["SGD"](full_params()).state_dict()
    optimizer.load_state_dict(migration.from_torch(optimizer, saved, scaler=scaler))
    assert optimizer.loss_scale == expected


def trained(kind: str = "AdamW") -> tuple[Any, list[nn.Parameter], list[nn.Parameter]]:
    """A plain optimizer over what other systems call masters, and what they are masters of."""
    params = full_params()
    theirs = KINDS[kind](groups_of(params))
    step_torch(theirs, params, range(3))
    return theirs, params, halved(params)


@pytest.mark.parametrize("as_object", [False, True])
def test_a_checkpoint_of_apex(as_object: bool) -> None:
    theirs, params, mine = trained()
    scaler: Any = {"cur_scale": 2.0**12, "cur_iter": 3, "scale_window": 2000}
    saved = {
        "loss_scaler": SimpleNamespace(**scaler) if as_object else scaler,
        "dynamic_loss_scale": True,
        "overflow": False,
        "first_closure_call_this_step": True,
        "optimizer_state_dict": copy.deepcopy(theirs.state_dict()),
        "fp32_from_fp16": [[p.detach().clone() for p in params[:2]], []],
    }
    optimizer = GENERAL.wrap(KINDS["AdamW"](groups_of(mine)))
    optimizer.load_state_dict(migration.from_apex(optimizer, saved))
    goes_on(optimizer, mine, theirs, params, 2.0**12)


def test_a_checkpoint_of_megatron() -> None:
    theirs, params, mine = trained()
    saved = {
        "optimizer": copy.deepcopy(theirs.state_dict()),
        "grad_scaler": {
            "scale": torch.tensor([2.0**14]),
            "growth_tracker": 5,
            "hysteresis_tracker": 2,
        },
        "fp32_from_fp16_params": [[p.detach().clone() for p in params[:2]], []],
    }
    optimizer = GENERAL.wrap(KINDS["AdamW"](groups_of(mine)))
    optimizer.load_state_dict(migration.from_megatron(optimizer, saved))
    assert optimizer.state_dict()["mpcore"]["loss_scale"]["growth_tracker"] == 5
    goes_on(optimizer, mine, theirs, params, 2.0**14)


def test_a_checkpoint_of_deepspeed() -> None:
    # it steps one flat master for each group
    params = full_params()
    flat = [
        nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        for group in groups_of(params)
    ]
    theirs = torch.optim.AdamW(
        [{"params": [flat[0]]}, {"params": [flat[1]], "lr": 0.05}], lr=0.1, weight_decay=0.1
    )

    def step(seeds: range) -> None:
        for seed in seeds:
            grads = gradients(params, seed)
            flat[0].grad = torch.cat([g.flatten() for g in grads[:2]])
            flat[1].grad = grads[2].flatten()
            theirs.step()

    step(range(3))
    saved = {
        "dynamic_loss_scale": True,
        "cur_scale": 2.0**10,
        "cur_iter": 3,
        "last_overflow_iter": -1,
        "scale_factor": 2.0,
        "scale_window": 1000,
        "optimizer_state_dict": copy.deepcopy(theirs.state_dict()),
        "fp32_groups_flat": [p.detach().clone() for p in flat],
        "clip_grad": 0.0,
    }
    mine = [
        nn.Parameter(piece.view(param.shape).half())
        for group, whole in zip(groups_of(params), flat, strict=True)
        for piece, param in zip(
            whole.detach().split([p.numel() for p in group["params"]]),
            group["params"],
            strict=True,
        )
    ]
    optimizer = GENERAL.wrap(KINDS["AdamW"](groups_of(mine)))
    optimizer.load_state_dict(migration.from_deepspeed(optimizer, saved))
    assert optimizer.loss_scale == 2.0**10
    step(range(3, 6))
    step_ours(optimizer, mine, range(3, 6))
    masters = masters_of(optimizer, mine)
    assert same_bits(torch.cat([m.flatten() for m in masters[:2]]), flat[0].detach())
    assert same_bits(masters[2].flatten(), flat[1].detach())


def goes_on(
    optimizer: Any, mine: list[nn.Parameter], theirs: Any, params: list[nn.Parameter], scale: float
) -> None:
    assert optimizer.loss_scale == scale
    step_torch(theirs, params, range(3, 6))
    step_ours(optimizer, mine, range(3, 6))
    assert same_bits(masters_of(optimizer, mine), [p.detach() for p in params])


def test_what_does_not_fit_is_named() -> None:
    theirs, params, mine = trained()
    optimizer = GENERAL.wrap(KINDS["AdamW"](groups_of(mine)))
    inner = theirs.state_dict()
    for call, message in (
        (lambda: migration.from_torch(optimizer, {}), r"expected the key 'state', got \[\]"),
        (lambda: migration.from_torch(optimizer, inner, masters=params[:2]), "expected 3 tensors"),
        (lambda: migration.from_apex(optimizer, {}), "expected the key 'optimizer_state_dict'"),
        (
            lambda: migration.from_megatron(
                optimizer, {"optimizer": inner, "fp32_from_fp16_params": [params]}
            ),
            "expected 2, one for each 16-bit parameter, got 3",
        ),
        (
            lambda: migration.from_deepspeed(
                optimizer, {"optimizer_state_dict": inner, "fp32_groups_flat": [torch.ones(3)]}
            ),
            "expected 2 tensors, one for each param group, got 1",
        ),
        (
            lambda: migration.from_deepspeed(
                optimizer,
                {"optimizer_state_dict": inner, "fp32_groups_flat": [torch.ones(3)] * 2},
            ),
            "param group 0: expected 'master' of 13 elements, got 3",
        ),
        (
            lambda: migration.from_torch(
                optimizer, torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict()
            ),
            "expected 3 parameters, got 1",
        ),
    ):
        with pytest.raises(mpcore.ArgumentError, match=message):
            call()


def test_the_float32_weights_of_a_model(engine: Engine) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = nn.Parameter(model[2].weight.detach())
    model.tied = model[2]  # one weight of two names
    expected = copy.deepcopy(model.state_dict())
    optimizer = engine.wrap(torch.optim.AdamW(model.parameters(), lr=0.1), mpcore.NoLossScale())
    model = mpcore.cast_model(model, torch.bfloat16, optimizer)
    exported = migration.float32_state_dict(model, optimizer)
    assert same_bits(exported, dict(expected))
    optimizer.backward(model(torch.ones(5, 4).bfloat16()).float().square().mean())
    optimizer.step()
    exported = migration.float32_state_dict(model, optimizer)
    assert exported["0.weight"] is not optimizer.state[model[0].weight]["master"]
    assert same_bits(exported["0.weight"], optimizer.state[model[0].weight]["master"].detach())
    fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    fresh.tied = fresh[2]
    fresh.load_state_dict(exported)
    assert torch.equal(fresh[0].weight.bfloat16(), model[0].weight)
