"""Every kind of bad input: one clear error that says what to do, and nothing has changed."""

from __future__ import annotations

from typing import Any

import mpcore
import pytest
import torch
from mpcore.errors import ArgumentError, ArgumentTypeError, BackendError, MpcoreError, StageError
from torch import nn

from mpcore_testing.engines import GENERAL, Engine
from mpcore_testing.refusals import (
    DTYPES,
    SCALE,
    adamw,
    assert_usable,
    frozen,
    loss_of,
    make,
    snapshot,
    weights,
)

# ------------------------------------------------------------------ what cannot be wrapped


def two_groups_with_one_weight() -> torch.optim.Optimizer:
    first, second = weights(DTYPES[:2])
    inner = adamw([first, second])
    inner.param_groups.append({**inner.param_groups[0], "params": [second]})
    return inner


def of_dtype(dtype: torch.dtype) -> torch.optim.Optimizer:
    bad = nn.Parameter(torch.ones(2, 3).to(dtype), requires_grad=dtype.is_complex)
    return adamw([*weights(), bad])


UNWRAPPABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "a model": (
        lambda: nn.Linear(2, 2),
        ArgumentTypeError,
        r"^optimizer: expected a torch\.optim\.Optimizer, got Linear\. Pass the object",
    ),
    "parameters": (weights, ArgumentTypeError, r"^optimizer: expected .*, got list\. "),
    "a class": (lambda: torch.optim.AdamW, ArgumentTypeError, r"^optimizer: .*, got type\. "),
    "none": (lambda: None, ArgumentTypeError, r"^optimizer: .*, got NoneType\. "),
    "a scaler": (lambda: torch.amp.GradScaler("cpu"), ArgumentTypeError, "got GradScaler"),
    "wrapped": (
        lambda: make(GENERAL)[1],
        ArgumentError,
        r"^optimizer: expected an unwrapped .*wrapped",
    ),
    "sparse adam": (
        lambda: torch.optim.SparseAdam(weights()),
        ArgumentError,
        r"^optimizer: expected one for dense gradients, got SparseAdam\. Use Adam",
    ),
    "differentiable": (
        lambda: torch.optim.Adam(weights(), differentiable=True),
        ArgumentError,
        r"^optimizer: expected differentiable=False, got True\. ",
    ),
    "complex": (
        lambda: of_dtype(torch.complex64),
        ArgumentError,
        r"^group 0, parameter 3, \[2, 3\]: expected float16.*, got torch\.complex64\. \w",
    ),
    "integer": (
        lambda: of_dtype(torch.int64),
        ArgumentError,
        r"^group 0, parameter 3, \[2, 3\]: expected float16.*, got torch\.int64\. \w",
    ),
    "twice": (
        two_groups_with_one_weight,
        ArgumentError,
        r"parameter .*: expected every parameter once, got it twice\. Tied weights",
    ),
}


@pytest.mark.parametrize("case", UNWRAPPABLE)
def test_what_cannot_be_wrapped_is_refused_and_left_alone(engine: Engine, case: str) -> None:
    build, error, message = UNWRAPPABLE[case]
    subject = build()
    optimizing = isinstance(subject, torch.optim.Optimizer)
    params = [p for g in subject.param_groups for p in g["params"]] if optimizing else []
    before = snapshot(params, subject) if optimizing else None
    with pytest.raises(error, match=message):
        engine.wrap(subject)
    assert before is None or snapshot(params, subject) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, ArgumentError, r"^backend: expected one of auto, .*, got 'cuda'\."),
        ({"backend": None}, ArgumentError, r"^backend: expected one of .*, got None\."),
        ({"path": "fused!"}, ArgumentError, r"^path: expected one of auto, .*, got 'fused!'\."),
        ({"loss_scale": 1024.0}, ArgumentTypeError, r"^loss_scale: expected .*, got 1024\.0\. For"),
        ({"loss_scale": None}, ArgumentTypeError, r"^loss_scale: expected .*, got None\. "),
        ({"loss_scale": "dynamic"}, ArgumentTypeError, r"^loss_scale: .*, got 'dynamic'\. "),
    ],
)
def test_a_bad_option_is_refused_and_the_inner_optimizer_stays_free(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    params = weights()
    inner = adamw(params)
    before = snapshot(params, inner)
    with pytest.raises(error, match=message):
        mpcore.MixedPrecisionOptimizer(inner, **options)
    assert snapshot(params, inner) == before
    inner.step()  # nobody guards it
    assert_usable(params, mpcore.MixedPrecisionOptimizer(inner, SCALE))


def test_a_backend_that_cannot_run_here_is_refused_and_the_inner_optimizer_stays_free() -> None:
    pytest.importorskip("triton")
    params = weights([torch.float64])
    inner = adamw(params)
    with pytest.raises(BackendError, match=r'^backend: expected one .* here, got "triton": .*Pass'):
        mpcore.MixedPrecisionOptimizer(inner, backend="triton")
    inner.step()
    assert_usable(params, mpcore.MixedPrecisionOptimizer(inner, SCALE))


def test_an_inner_optimizer_has_one_wrapper_at_a_time(engine: Engine) -> None:
    params = weights()
    inner = adamw(params)
    first = engine.wrap(inner, SCALE)
    with pytest.raises(ArgumentError, match=r"^optimizer: expected an unwrapped .* got one that"):
        engine.wrap(inner, SCALE)
    assert_usable(params, first)


# ------------------------------------------------------------------ at the wrong moment


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("call", ["step", "unscale_", "clip_grad_norm_"])
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_gradients_that_were_never_scaled_are_refused(
    engine: Engine, steps: int, call: str, value: float
) -> None:
    params, optimizer = make(engine, steps=steps)
    optimizer.zero_grad()
    for param in params:
        param.grad = torch.zeros_like(param)
    params[-1].grad[1, 2] = value
    before = snapshot(params, optimizer)
    with pytest.raises(
        StageError, match=rf"^{call}\(\): expected .*scaled.* got no scale\(\)"
    ) as e:
        getattr(optimizer, call)(*([1.0] if call == "clip_grad_norm_" else []))
    assert "optimizer.backward(loss)" in str(e.value)
    assert snapshot(params, optimizer) == before
    assert_usable(params, optimizer)


def test_zeros_that_were_never_scaled_are_refused_once_training_began(engine: Engine) -> None:
    params, optimizer = make(engine, steps=1)
    optimizer.zero_grad(set_to_none=False)
    before = snapshot(params, optimizer)
    with pytest.raises(StageError, match="got no scale"):
        optimizer.step()
    assert snapshot(params, optimizer) == before


@pytest.mark.parametrize("clipped", [False, True])
def test_a_second_unscale_is_refused_and_the_first_one_counts(
    engine: Engine, clipped: bool
) -> None:
    params, optimizer = make(engine, steps=2)
    others, other = make(engine, steps=2)
    for one, given in ((optimizer, params), (other, others)):
        one.zero_grad()
        one.backward(loss_of(given))
        one.unscale_()
        if clipped:
            one.clip_grad_norm_(1.0)
    before = snapshot(params, optimizer)
    advice = r"Call step\(\) first, or zero_grad\(\) of this optimizer\."
    with pytest.raises(StageError, match=rf"^unscale_\(\): expected one call .* {advice}"):
        optimizer.unscale_()
    assert snapshot(params, optimizer) == before
    optimizer.step()
    other.step()
    assert frozen(params) == frozen(others)


def test_the_inner_optimizer_refuses_to_be_stepped_directly(engine: Engine) -> None:
    params, optimizer = make(engine, steps=2)
    optimizer.zero_grad()
    optimizer.backward(loss_of(params))
    before = snapshot(params, optimizer)
    with pytest.raises(
        StageError, match=r"^AdamW\.step\(\): expected .* got a direct call\. .*wrapper"
    ):
        optimizer.inner.step()
    assert snapshot(params, optimizer) == before
    assert_usable(params, optimizer)


def test_the_inner_optimizer_is_free_again_after_its_wrapper_is_gone(engine: Engine) -> None:
    params, optimizer = make(engine)
    inner = optimizer.inner
    del optimizer
    loss_of(params).backward()
    inner.step()
    assert_usable(params, engine.wrap(inner, SCALE))


def test_every_error_of_the_engine_is_caught_by_one_class() -> None:
    for kind in (ArgumentError, ArgumentTypeError, StageError, BackendError):
        assert issubclass(kind, MpcoreError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(StageError, RuntimeError)
