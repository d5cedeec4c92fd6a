"""Part 2: every kernel against the reference backend on the CPU, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from mpcore.backends import reference
from torch import Tensor

import mpcore_kernels
from mpcore_testing.batches import Move
from mpcore_testing.gpu_run.compare import Differences
from mpcore_testing.gpu_run.record import Recorder, Row
from mpcore_testing.gpu_run.setting import Setting
from mpcore_testing.gpu_run.updates import update_rows
from mpcore_testing.kernels import (
    FLOATS,
    HALVES,
    all_patterns,
    flags,
    random_bits,
    random_finite,
    rounding_boundaries,
)

COEFFICIENTS = (2.0**-24, 0.37, 1.0, 2.0**16)
#: found_inf of successive steps
COURSE = (0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0)


def run(record: Recorder, setting: Setting) -> None:
    """Compares; what differs is a result."""
    rows: list[tuple[str, Callable[[], Row]]] = []
    for dtype in FLOATS:
        rows.append((f"unscale_ {name(dtype)}", lambda d=dtype: _unscale(setting, d)))
        rows.append((f"unscale_into {name(dtype)}", lambda d=dtype: _unscale_into(setting, d)))
    for dtype in HALVES:
        rows.append((f"cast_into {name(dtype)}", lambda d=dtype: _cast(setting, d)))
    for dtype in FLOATS:
        if setting.on_a_gpu:
            rows.append((f"inspect {name(dtype)}", lambda d=dtype: _inspect(setting, d, False)))
        title = f"inspect {name(dtype)}, statistics"
        rows.append((title, lambda d=dtype: _inspect(setting, d, True)))
    rows.append(("update_scale_", lambda: _scale(setting)))
    for title, measure in [*rows, *update_rows(setting)]:
        record.row(title, measure)


def name(dtype: torch.dtype | None) -> str:
    """Short for tables."""
    return str(dtype).removeprefix("torch.")


def _values(setting: Setting, dtype: torch.dtype) -> Tensor:
    """Every pattern of 16 bits, the places where rounding turns, and random bits."""
    many = random_bits(setting.sizes.values, dtype, seed=0)
    special = rounding_boundaries() if dtype == torch.float32 else all_patterns(dtype)
    return torch.cat([special if setting.on_a_gpu else special[::37], many])


def _unscale(setting: Setting, dtype: torch.dtype) -> Row:
    found = Differences()
    for coefficient in COEFFICIENTS:
        values = _values(setting, dtype)
        ours, theirs = values.to(setting.device, copy=True), values.clone()
        ours_flags, theirs_flags = flags(1, setting.device), flags(1, "cpu")
        scalar = torch.tensor(coefficient)
        mpcore_kernels.unscale_([ours], scalar.to(setting.device), ours_flags)
        reference.unscale_([theirs], scalar, theirs_flags)
        found.add("gradient", ours, theirs, {"gradient": values, "coefficient": scalar})
        found.add("nonfinite", ours_flags, theirs_flags)
    return found.to_row()


def _unscale_into(setting: Setting, dtype: torch.dtype) -> Row:
    found, values = Differences(), _values(setting, dtype)
    placed = values.to(setting.device)
    for coefficient in COEFFICIENTS:
        scalar = torch.tensor(coefficient)
        ours = torch.empty_like(placed, dtype=torch.float32)
        theirs = torch.empty_like(values, dtype=torch.float32)
        ours_flags, theirs_flags = flags(1, setting.device), flags(1, "cpu")
        mpcore_kernels.unscale_into([placed], [ours], scalar.to(setting.device), ours_flags)
        reference.unscale_into([values], [theirs], scalar, theirs_flags)
        found.add("out", ours, theirs, {"gradient": values, "coefficient": scalar})
        found.add("nonfinite", ours_flags, theirs_flags)
    return found.to_row()


def _cast(setting: Setting, dtype: torch.dtype) -> Row:
    found, masters = Differences(), _values(setting, torch.float32)
    placed = masters.to(setting.device)
    ours = torch.zeros_like(placed, dtype=dtype)
    theirs = torch.zeros_like(masters, dtype=dtype)
    for found_inf in (1, 0):  # 1: nothing may be written
        counts = [setting.scalar(0, torch.int64), torch.tensor(0)]
        mpcore_kernels.cast_into(
            [placed], [ours], setting.scalar(found_inf, torch.int32), counts[0]
        )
        reference.cast_into(
            [masters], [theirs], torch.tensor(found_inf, dtype=torch.int32), counts[1]
        )
        found.add("weight", ours, theirs, {"master": masters})
        found.add("saturated", *counts)
    return found.to_row()


def _inspect(setting: Setting, dtype: torch.dtype, statistics: bool) -> Row:
    """Finite gradients and such with infinities and NaNs, of several sizes."""
    found = Differences()
    coefficients = (*COEFFICIENTS, 2.0**80) if setting.on_a_gpu else (0.37,)
    sizes = [*setting.sizes.lengths, setting.sizes.values]
    for make in (random_finite, random_bits):
        grads = [make(size, dtype, seed=i) for i, size in enumerate(sizes)]
        placed = [grad.to(setting.device) for grad in grads]
        for coefficient in coefficients:
            scalar = torch.tensor(coefficient)
            for inverted in (False, True):
                ours = mpcore_kernels.inspect(
                    *(placed, scalar.to(setting.device), 1.0),
                    inverted=inverted,
                    statistics=statistics,
                )
                theirs = reference.inspect(
                    grads, scalar, 1.0, inverted=inverted, statistics=statistics
                )
                for field in dataclasses.fields(theirs):
                    expected = getattr(theirs, field.name)
                    if expected is not None:
                        inputs = {"coefficient": scalar}
                        found.add(field.name, getattr(ours, field.name), expected, inputs)
    return found.to_row()


def _scale(setting: Setting) -> Row:
    """A dynamic loss scale over a course of overflows, at its bounds and away from them."""
    found = Differences()
    for changes in (
        {},
        {"hysteresis": 2, "refill": 3},
        {"tolerance": (2, 4)},
        {"max_scale": 512.0},
    ):
        ours, theirs = (
            dataclasses.replace(Move.on(device), **changes)
            for device in (setting.device, torch.device("cpu"))
        )
        for overflow in COURSE:
            mpcore_kernels.update_scale_(ours, setting.scalar(overflow, torch.int32))
            reference.update_scale_(theirs, torch.tensor(overflow, dtype=torch.int32))
            names = ("scale", "growth_tracker", "overflows_left", "counters")
            for key, one, other in zip(names, ours.tensors(), theirs.tensors(), strict=True):
                found.add(key, one, other)
    return found.to_row()
