"""`MixedPrecisionOptimizer` is a torch.optim.Optimizer, and trains as one on FP32 copies would."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=3)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def make(
    engine: Engine, dtypes: Any = DTYPES, seed: int = 0, build: Any = sgd, scale: Any = SCALE
) -> tuple[list[nn.Parameter], mpcore.MixedPrecisionOptimizer]:
    generator = torch.Generator().manual_seed(seed)
    taken = engine.dtypes(dtypes)
    params = [nn.Parameter(torch.randn(3, 4, generator=generator).to(d)) for d in taken]
    return params, engine.wrap(build(params), scale)


def wide_copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    wide = torch.float32
    return [
        nn.Parameter(p.detach().to(torch.promote_types(p.dtype, wide), copy=True)) for p in params
    ]


def hand_over(params: list[nn.Parameter], copies: list[nn.Parameter], scale: float) -> None:
    """Gives the copies the unscaled gradients: exact, since the scale is a power of two."""
    for param, copy in zip(params, copies, strict=True):
        copy.grad = None if param.grad is None else param.grad.to(copy.dtype) / scale


def loss_of(params: list[nn.Parameter], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(p.shape, generator=generator) for p in params]
    terms = [(p.float() * w).sum().cpu() for p, w in zip(params, weights, strict=True)]
    return torch.stack(terms).sum()


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.detach().view(size), expected.detach().view(size))


def assert_trained_like(
    engine: Engine,
    optimizer: Any,
    params: list[nn.Parameter],
    copies: list[nn.Parameter],
    steps: int = 10,
) -> None:
    for param, copy in zip(params, copies, strict=True):
        half = param.dtype in (torch.float16, torch.bfloat16)
        before = param.detach().float() if half else param
        master = optimizer.state.get(param, {}).get("master", before)
        assert engine.agree(master, copy, steps=steps)
        assert_equal_bits(param, master.to(param.dtype))


def test_wrapper_is_an_optimizer_that_shares_groups_with_the_inner_one(engine: Engine) -> None:
    params, optimizer = make(engine)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))
    assert optimizer.defaults == optimizer.inner.defaults
    assert (optimizer.loss_scale, optimizer.steps, optimizer.skipped_steps) == (256.0, 0, 0)
    assert optimizer.last_step is None
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("build", [sgd, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_mixture_of_dtypes_in_one_group_trains_as_wide_copies(engine: Engine, build: Any) -> None:
    params, optimizer = make(engine, build=build)
    copies = wide_copies(params)
    reference = build(copies)
    for step in range(8):
        optimizer.zero_grad()
        optimizer.backward(loss_of(params, step))
        hand_over(params, copies, optimizer.loss_scale)
        assert optimizer.step() is None
        reference.step()
        assert_trained_like(engine, optimizer, params, copies)
    assert (optimizer.steps, optimizer.skipped_steps, optimizer.loss_scale) == (8, 0, 1024.0)
    assert "master" not in optimizer.state[params[2]]


def test_weights_that_get_no_gradient_are_left_alone_and_may_join_later(engine: Engine) -> None:
    params, optimizer = make(engine)
    copies = wide_copies(params)
    reference = sgd(copies)
    for step in range(6):
        optimizer.zero_grad()
        used = params[:1] + params[2:3] if step < 3 else params
        optimizer.backward(loss_of(used, step))
        hand_over(params, copies, optimizer.loss_scale)
        optimizer.step()
        reference.step()
        assert_trained_like(engine, optimizer, params, copies)
        # only its master: some optimizers move parameters that have no gradient
        assert (set(optimizer.state[params[1]]) > {"master"}) == (step >= 3)


def test_step_without_any_gradient_does_and_counts_nothing(engine: Engine) -> None:
    params, optimizer = make(engine)
    before = wide_copies(params)
    optimizer.step()
    optimizer.backward(torch.zeros((), requires_grad=True))
    assert optimizer.clip_grad_norm_(1.0) == 0.0
    optimizer.unscale_()
    optimizer.step()
    assert (optimizer.steps, optimizer.loss_scale, optimizer.last_step) == (0, 256.0, None)
    assert_trained_like(engine, optimizer, params, before)


def test_frozen_weights_stay_and_unfrozen_ones_train(engine: Engine) -> None:
    params, optimizer = make(engine)
    copies = wide_copies(params)
    reference = sgd(copies)
    for step in range(9):
        for param in params[::3]:  # the float16 and the float64 one
            param.requires_grad_(step // 3 != 1)
        optimizer.zero_grad()
        optimizer.backward(loss_of(params, step))
        hand_over(params, copies, optimizer.loss_scale)
        optimizer.step()
        reference.step()
        assert_trained_like(engine, optimizer, params, copies)


def test_tied_weights_stay_tied_and_train_on_the_sum_of_their_gradients(engine: Engine) -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head).half()
    optimizer = engine.wrap(sgd(model.parameters()), SCALE)
    copies = wide_copies(list(model.parameters()))
    reference = sgd(copies)
    for _ in range(4):
        optimizer.zero_grad()
        logits = embedding(torch.arange(6)).float() @ head.weight.float().t()
        optimizer.backward(logits.square().mean())
        hand_over(list(model.parameters()), copies, optimizer.loss_scale)
        optimizer.step()
        reference.step()
    assert head.weight is embedding.weight
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert_trained_like(engine, optimizer, list(model.parameters()), copies)


def test_micro_batches_of_exact_gradients_equal_one_batch(engine: Engine) -> None:
    (params, optimizer), (others, other) = make(engine), make(engine)
    for step in range(3):
        quarters = [torch.full((3, 4), float(k + step)) for k in range(4)]
        optimizer.zero_grad()
        other.zero_grad()
        for quarter in quarters:
            optimizer.backward(sum((p.float() * quarter).sum() for p in params))
        whole = torch.stack(quarters).sum(0)
        other.backward(sum((p.float() * whole).sum() for p in others))
        optimizer.step()
        other.step()
    for mine, theirs in zip(params, others, strict=True):
        assert_equal_bits(mine, theirs)


def test_zero_grad_clears_or_fills_and_forgets_what_no_step_used(engine: Engine) -> None:
    params, optimizer = make(engine)
    for set_to_none in (True, False):
        optimizer.backward(loss_of(params, 0))
        optimizer.clip_grad_norm_(1e-3)
        optimizer.unscale_()
        optimizer.zero_grad(set_to_none=set_to_none)
        if set_to_none:
            assert all(param.grad is None for param in params)
        else:
            assert all(not param.grad.any() for param in params)
    copies = wide_copies(params)
    reference = sgd(copies)
    optimizer.backward(loss_of(params, 1))
    hand_over(params, copies, optimizer.loss_scale)
    optimizer.step()
    reference.step()
    assert_trained_like(engine, optimizer, params, copies)


def test_last_step_is_read_lazily_and_stays_valid(engine: Engine) -> None:
    params, optimizer = make(engine, [torch.float16, torch.float32], build=torch.optim.AdamW)
    results = []
    for step, factor in enumerate((1.0, torch.inf, 1.0)):
        optimizer.zero_grad()
        optimizer.backward(loss_of(params, step) * factor)
        if step != 2:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        results.append(optimizer.last_step)
        optimizer.zero_grad()
    assert [result.skipped for result in results] == [False, True, False]
    assert [result.loss_scale for result in results] == [256.0, 256.0, 128.0]
    assert results[0].grad_norm > 1.0
    assert not torch.isfinite(torch.tensor(results[1].grad_norm))
    assert results[2].grad_norm is None
    assert [len(result.overflowed()) for result in results] == [0, 2, 0]


@pytest.mark.parametrize("named", [True, False])
def test_overflowed_names_the_parameters_and_only_those(engine: Engine, named: bool) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 3), "last": nn.Linear(3, 2).half()})
    given = model.named_parameters() if named else model.parameters()
    optimizer = engine.wrap(sgd(given), SCALE)
    optimizer.scale(torch.ones(()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model["first"].bias.grad[1] = torch.inf
    model["last"].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.last_step.skipped
    unnamed = ["group 0, parameter 1, [3]", "group 0, parameter 2, [2, 3]"]
    assert optimizer.last_step.overflowed() == (["first.bias", "last.weight"] if named else unnamed)


def test_repr_names_the_inner_optimizer_the_path_and_the_backend_and_shows_groups(
    engine: Engine,
) -> None:
    optimizer = make(engine)[1]
    (path,) = optimizer.path
    assert (path.path, path.reason) == (
        ("fused", "SGD") if engine.fused else ("general", "it was asked for")
    )
    expected = (
        "MixedPrecisionOptimizer(SGD, DynamicLossScale(init=256.0",
        f"backend='{engine.backend}', path of each group: 0: {path.path}: {path.reason})",
        "lr: 0.1",
    )
    for part in expected:
        assert part in repr(optimizer)
