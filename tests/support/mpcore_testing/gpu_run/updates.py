"""Fused updates of the kernels beside those of the reference backend on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mpcore import updates
from mpcore.backends import reference
from torch import Tensor

import mpcore_kernels
from mpcore_testing.batches import (
    COMBINATIONS,
    HALF,
    KINDS,
    OPTIONS,
    Batch,
    make_batch,
    make_grads,
)
from mpcore_testing.gpu_run.compare import Differences
from mpcore_testing.gpu_run.record import Row
from mpcore_testing.gpu_run.setting import Setting
from mpcore_testing.kernels import random_bits, random_finite

_COEFFICIENT = 0.37


def update_rows(setting: Setting) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yields a row for each rule, options and formats, those that people use first."""
    options = OPTIONS if setting.sizes.every_option else KINDS[:: 1 if setting.on_a_gpu else 2]
    combinations = COMBINATIONS[: setting.sizes.combinations]
    for grad, weight in combinations:
        for rule, moments, numbers in options:
            title = f"update_ {rule}, {moments} moments, {_kinds(grad, weight)}, {numbers}"
            case = (rule, moments, numbers, grad, weight)
            yield title, lambda case=case: _update(setting, *case)
    yield "update_ adam, every step count", lambda: _counts(setting)


def _kinds(grad: torch.dtype, weight: torch.dtype | None) -> str:
    kinds = [str(kind).removeprefix("torch.") for kind in (grad, weight)]
    return f"{kinds[0]} gradients" + (f" and {kinds[1]} weights" if weight else "")


def _update(
    setting: Setting,
    rule: str,
    moments: int,
    numbers: tuple[float, ...],
    grad: torch.dtype,
    weight: torch.dtype | None,
) -> Row:
    """Two steps from fresh counts, the last one after a step that was skipped."""
    found = Differences()
    for make in (random_finite, random_bits):
        batch = make_batch(moments, weight, setting.sizes.lengths, steps=0.0, make=make)
        for number, found_inf in enumerate((0, 1, 0)):
            grads = make_grads(batch, grad, 50 * (number + 1), make)
            _step(setting, rule, numbers, batch, grads, found_inf, found)
    return found.to_row()


def _counts(setting: Setting) -> Row:
    """Bias corrections at step counts from 0 to far beyond any training."""
    rule, moments, numbers = OPTIONS[0]
    count = 500 if setting.on_a_gpu else 20
    batch = make_batch(moments, HALF, [5] * count)
    batch.steps = [torch.tensor(float(i * i * 64)) for i in range(count)]
    found = Differences()
    _step(setting, rule, numbers, batch, make_grads(batch, HALF, 1), 0, found)
    return found.to_row()


def _step(
    setting: Setting,
    rule: str,
    numbers: tuple[float, ...],
    batch: Batch,
    grads: list[Tensor],
    found_inf: int,
    found: Differences,
) -> None:
    """Updates a copy on the device and `batch` itself; both start from the same bits."""
    before = batch.on("cpu")
    ours = batch.on(setting.device)
    counts = [
        _take(backend, rule, numbers, part, [g.to(device) for g in grads], device, found_inf)
        for backend, part, device in (
            (mpcore_kernels, ours, setting.device),
            (reference, batch, torch.device("cpu")),
        )
    ]
    found.add("saturated", *counts)
    for index, grad in enumerate(grads):
        inputs = {"gradient": grad, "coefficient": torch.tensor(_COEFFICIENT)}
        inputs |= _of(before, index)
        for key, expected in _of(batch, index).items():
            shown = inputs if grad.numel() and expected.shape == grad.shape else None
            found.add(key, _of(ours, index)[key], expected, shown)


def _take(
    backend: Any,
    rule: str,
    numbers: tuple[float, ...],
    batch: Batch,
    grads: list[Tensor],
    device: torch.device,
    found_inf: int,
) -> Tensor:
    """One update; returns how many weights were clamped."""
    plan = backend.plan_update(rule, [updates.Batch(**vars(batch))])
    backend.prepare_(plan, updates.Hyper((numbers,), (None,)))
    saturated = torch.zeros((), dtype=torch.int64, device=device)
    backend.update_(
        *(plan, [grads], torch.tensor(_COEFFICIENT, device=device)),
        torch.tensor(found_inf, dtype=torch.int32, device=device),
        saturated,
    )
    return saturated


def _of(batch: Batch, index: int) -> dict[str, Tensor]:
    """The tensors of one parameter, by name."""
    named = {"master": batch.masters[index]}
    named |= {f"moment {k}": moment[index] for k, moment in enumerate(batch.moments)}
    if batch.weights is not None:
        named["weight"] = batch.weights[index]
    if batch.steps is not None:
        named["step"] = batch.steps[index]
    return named
