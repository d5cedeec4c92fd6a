"""`prepare_` of the compiled backend: the scalars of all tensors of a batch in one call of C."""

from __future__ import annotations

import ctypes
from array import array
from itertools import chain

import torch
from torch import Tensor

from mpcore.backends import _update
from mpcore.backends._c_compiler import declared
from mpcore.backends._c_source import STEPS
from mpcore.updates import Batch, Hyper, UpdateRule

_ARGUMENTS = (ctypes.c_int32, ctypes.c_int64, *[ctypes.c_void_p] * 4)


def prepare_(plan: _update.Plan, hyper: Hyper) -> None:
    """Computes the scalars of the plan's next update; bitwise `reference.prepare_`. CPU tensors.

    Args:
        plan: See the reference backend.
        hyper: See there.

    Raises:
        BackendError: The compiler refused.
    """
    rows = [
        (row[0] if lr is None else float(lr), *row[1:])
        for row, lr in zip(hyper.numbers, hyper.lrs, strict=True)
    ]
    numbers = array("d", chain.from_iterable(rows))
    counted = zip(plan.batches, plan.counts, strict=True)
    plan.scalars = [
        _scalars(plan.rule, batch, counts, numbers, len(rows)) for batch, counts in counted
    ]
    plan.hyper = hyper


def _scalars(
    rule: UpdateRule,
    batch: Batch,
    counts: Tensor | None,
    numbers: array[float],
    groups_there: int,
) -> Tensor:
    if counts is None and batch.steps:
        counts = torch.stack(list(batch.steps))
    wide = None if counts is None else counts.double()
    if batch.groups and not 0 <= min(batch.groups) <= max(batch.groups) < groups_there:
        raise IndexError(f"groups: expected some of {groups_there}, got {max(batch.groups)}.")
    shape = (len(batch.groups), len(rule.columns))
    # whatever torch.set_default_device says: C writes there
    scalars = torch.empty(shape, dtype=torch.float32, device="cpu")
    groups = array("q", batch.groups)
    declared("fill_scalars", None, *_ARGUMENTS)(
        STEPS.index((rule.name, len(batch.moments))),
        len(batch.groups),
        groups.buffer_info()[0],
        numbers.buffer_info()[0],
        None if wide is None else wide.data_ptr(),
        scalars.data_ptr(),
    )
    return scalars
