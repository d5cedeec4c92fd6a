"""Weights and gradients that changed under the optimizer: one clear error, nothing changed."""

from __future__ import annotations

import pytest
import torch
from mpcore.errors import ArgumentError, MpcoreError
from torch import nn

from mpcore_testing.engines import Engine
from mpcore_testing.refusals import (
    DTYPES,
    SCALE,
    assert_usable,
    frozen,
    loss_of,
    make,
    snapshot,
    weights,
)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("moved", [0, 2])
def test_a_weight_that_moved_to_another_device_is_refused(
    engine: Engine, moved: int, steps: int
) -> None:
    params, optimizer = make(engine, steps=steps)
    optimizer.zero_grad()
    optimizer.backward(loss_of(params))
    torch.utils.swap_tensors(params[moved], nn.Parameter(params[moved].detach().to("meta")))
    params[moved].grad = torch.zeros(2, 3, dtype=params[moved].dtype, device="meta")
    before = snapshot(params, optimizer)
    message = rf"^group 0, parameter {moved}, \[2, 3\]: expected it on cpu, .*, got meta\. Move"
    for call in (optimizer.step, optimizer.unscale_, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(ArgumentError, match=message):
            call()
        assert snapshot(params, optimizer) == before


@pytest.mark.parametrize("moved", [0, 1])
def test_a_16_bit_weight_that_became_float32_after_training_began_is_refused(
    engine: Engine, moved: int
) -> None:
    params, optimizer = make(engine, steps=2)
    optimizer.zero_grad()
    params[moved].data = params[moved].data.float()
    optimizer.backward(loss_of(params))
    before = snapshot(params, optimizer)
    message = (
        rf"^group 0, parameter {moved}, .*: expected the 16-bit dtype.*, got torch\.float32\. "
    )
    with pytest.raises(ArgumentError, match=message):
        optimizer.step()
    assert snapshot(params, optimizer) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sparse_gradient_is_refused(engine: Engine, dtype: torch.dtype) -> None:
    table = nn.Embedding(5, 3, sparse=True, dtype=dtype)
    other = weights([torch.float16])[0]
    optimizer = engine.wrap(torch.optim.SGD([other, table.weight], lr=0.1), SCALE)
    optimizer.backward(table(torch.tensor([1, 1])).float().sum() + other.float().sum())
    kept = frozen([other, other.grad, table.weight, dict(optimizer.state)])
    with pytest.raises(ArgumentError, match=r"^group 0, parameter 1, .*dense.*sparse=False"):
        optimizer.step()
    assert frozen([other, other.grad, table.weight, dict(optimizer.state)]) == kept
    assert (optimizer.steps, optimizer.loss_scale) == (0, 256.0)


def test_masters_of_a_wrong_shape_dtype_owner_or_number_are_refused(engine: Engine) -> None:
    params, optimizer = make(engine)
    half, _, single = params
    fits = torch.ones(2, 3)
    for pairs in (
        [(half, fits), (half, torch.zeros(2, 3))],
        [(half, fits), (single, torch.ones(2, 3))],
        [(half, torch.ones(3, 2))],
        [(half, fits.half())],
        [(half, fits.to("meta"))],
        [(half, fits), (nn.Parameter(fits.half()), fits)],
    ):
        before = snapshot(params, optimizer)
        with pytest.raises(ArgumentError, match=r"^adopt_masters: expected .*, got"):
            optimizer.adopt_masters(pairs)
        assert snapshot(params, optimizer) == before
    optimizer.adopt_masters([(half, fits)])
    with pytest.raises(ArgumentError, match=r"^adopt_masters: expected .* without a master"):
        optimizer.adopt_masters([(half, fits)])
    assert optimizer.state[half]["master"].data_ptr() == fits.data_ptr()


@pytest.mark.parametrize("late", [1, 2])
def test_a_gradient_that_appears_after_unscaling_does_not_reach_its_weight(
    engine: Engine, late: int
) -> None:
    params, optimizer = make(engine)
    optimizer.backward(params[0].float().sum())
    optimizer.unscale_()
    params[late].grad = torch.ones_like(params[late])  # of which nobody knows the scale
    before = frozen(params[1:])
    try:
        optimizer.step()
    except MpcoreError:
        pass
    else:
        assert optimizer.steps == 1
    assert frozen(params[1:]) == before


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_dropped_after_clipping_takes_its_weight_out_of_the_step(
    engine: Engine, unscaled: bool
) -> None:
    params, optimizer = make(engine)
    optimizer.backward(loss_of(params))
    if unscaled:
        optimizer.unscale_()
    optimizer.clip_grad_norm_(1.0)
    params[0].grad = params[2].grad = None
    before = [frozen(param) for param in params]
    optimizer.step()
    assert [frozen(p) != old for p, old in zip(params, before, strict=True)] == [False, True, False]
    assert optimizer.steps == 1


def test_dropping_every_gradient_after_clipping_leaves_nothing_to_step(engine: Engine) -> None:
    params, optimizer = make(engine, steps=2)
    optimizer.zero_grad()
    optimizer.backward(loss_of(params))
    optimizer.clip_grad_norm_(1.0)
    for param in params:
        param.grad = None
    before = snapshot(params, optimizer)
    optimizer.step()
    assert snapshot(params, optimizer) == before
    assert_usable(params, optimizer)


@pytest.mark.parametrize("bad", [0, 2])
def test_an_overflow_that_unscaling_found_is_not_dropped_with_its_gradient(
    engine: Engine, bad: int
) -> None:
    params, optimizer = make(engine, steps=2)
    optimizer.zero_grad()
    optimizer.backward(loss_of(params))
    params[bad].grad[0, 0] = torch.inf
    optimizer.unscale_()
    params[bad].grad = None
    before = frozen([params, dict(optimizer.state)])
    optimizer.step()
    assert frozen([params, dict(optimizer.state)]) == before
    assert optimizer.last_step.skipped


def test_weights_of_an_added_group_are_known_as_the_first_ones_are(engine: Engine) -> None:
    _, optimizer = make(engine, steps=1)
    adopted, moved = weights(DTYPES[:2])
    optimizer.add_param_group({"params": [adopted, moved]})
    optimizer.adopt_masters([(adopted, torch.ones(2, 3))])
    torch.utils.swap_tensors(moved, nn.Parameter(moved.detach().to("meta")))
    moved.grad = torch.zeros(2, 3, dtype=moved.dtype, device="meta")
    with pytest.raises(ArgumentError, match=r"^group 1, parameter 1, .*: expected it on cpu"):
        optimizer.step()
