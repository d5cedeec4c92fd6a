"""Whether an engine is what its model says, and nothing else: compared after each operation."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpcore_testing.comparisons import TALLY
from mpcore_testing.sequences.model import Model
from mpcore_testing.sequences.numbers import Near, rounded, same
from mpcore_testing.sequences.optimizers import COUNTS, MOMENTS
from mpcore_testing.sequences.pair import flat
from mpcore_testing.sequences.state import EVERY, PARAMETERS


def compare(optimizer: Any, params: list[Any], model: Model, *, gradients: bool = True) -> None:
    """Raises an AssertionError that says what differs.

    Then takes the engine's numbers in the place of the model's: each operation is judged by itself,
    and what it may not change has to stay bit for bit.
    """
    for i in EVERY:
        if gradients:
            _compare_gradient(params[i], model, i)
        _compare_weight(optimizer, params[i], model, i)
        _compare_state(optimizer, params[i], model, i)
    scale = model.scale
    assert optimizer.loss_scale == scale.now, f"scale {optimizer.loss_scale}, not {scale.now}"
    found = optimizer.steps, optimizer.skipped_steps, optimizer.skips_in_a_row
    expected = scale.steps, scale.skipped, scale.in_a_row
    assert found == expected, f"steps, skipped, in a row: {found}, expected {expected}"
    last = optimizer.last_step
    result = None if last is None else (last.skipped, last.loss_scale)
    assert result == model.last, f"last step: {result}, expected {model.last}"


def _compare_gradient(param: Any, model: Model, i: int) -> None:
    expected, grad = model.grad(i), param.grad
    assert (grad is None) == (expected is None), f"gradient {i}: {grad}, expected {expected}"
    if expected is not None:
        _near(f"gradient {i}", flat(grad), expected)
        model.settle_grad(i, Near(flat(grad)))
    if model.look is None or not model.look.shown:
        assert param.grad_dtype == param.dtype, f"grad_dtype {i}: {param.grad_dtype}"


def _compare_weight(optimizer: Any, param: Any, model: Model, i: int) -> None:
    dtype = PARAMETERS[i][0]
    state = optimizer.state.get(param, {})
    assert ("master" in state) == (i in model.made), f"master {i}: {state}, of {model.made}"
    weight = flat(param)
    master = flat(state["master"]) if "master" in state else weight
    _near(f"master {i}", master, model.masters[i])
    model.masters[i] = Near(master)
    expected = model.weights[i]
    if expected is None:
        expected = rounded(master, dtype, saturates=True)
    TALLY.add(len(weight))
    assert same(weight, expected).all(), f"weight {i}: {weight}, expected {expected}"
    model.weights[i] = np.array(weight)


def _compare_state(optimizer: Any, param: Any, model: Model, i: int) -> None:
    state = optimizer.state.get(param, {})
    for number, name in enumerate(MOMENTS[model.optimizer]):
        moment = state.get(name)
        expected = model.moments[i][number]
        actual = np.zeros_like(expected.value) if moment is None else flat(moment)
        _near(f"{name} of {i}", actual, expected)
        model.moments[i][number] = Near(actual)
        if model.optimizer == "SGD" and model.counts[i]:
            assert moment is not None, f"{name} of {i} is gone"
    count = state.get("step")
    if count is not None or model.optimizer in COUNTS:
        found = 0 if count is None else float(count)
        assert found == model.counts[i], f"step of {i}: {found}, expected {model.counts[i]}"


def compare_scale_state(saved: dict[str, Any], scale: Any) -> None:
    """What a checkpoint says of the loss scale."""
    expected = {"scale": scale.now, "steps": scale.steps, "skipped_steps": scale.skipped}
    expected["skips_in_a_row"] = scale.in_a_row
    if scale.moves:
        expected["growth_tracker"] = scale.clean
    if scale.name == "headroom":
        expected["peak"], expected["peak_before"] = scale.peaks
    elif scale.moves:
        expected["overflows_left"] = scale.left
    found = {name: saved[name] for name in expected}
    assert found == expected, f"loss scale: {found}, expected {expected}"


def _near(what: str, actual: Any, expected: Near) -> None:
    TALLY.add(len(actual))
    assert expected.holds(actual), (
        f"{what}: {actual}, expected {expected.value} within {expected.error}"
    )
