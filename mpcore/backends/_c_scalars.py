"""`prepare_` of the compiled backend: the scalars of all tensors of a batch in one call of C."""

from __future__ import annotations

import ctypes
from array import array
from itertools import chain

import torch
from torch import Tensor

from mpcore.backends._c_compiler import declared
from mpcore.backends._c_source import STEPS
from mpcore.backends._c_update import Plan
from mpcore.updates import Batch, Hyper, UpdateRule

_ARGUMENTS = (ctypes.c_int32, ctypes.c_int64, *[ctypes.c_void_p] * 4)


def prepare_(plan: Plan, hyper: Hyper) -> None:
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
    for groups in filter(None, plan.groups):
        if not 0 <= min(groups) <= max(groups) < len(rows):
            raise IndexError(f"groups: expected some of {len(rows)}, got {max(groups)}.")
    parts = zip(plan.batches, plan.counts, plan.groups, strict=True)
    plan.scalars = [_scalars(plan.rule, *part, numbers) for part in parts]
    plan.hyper = hyper


def _scalars(
    rule: UpdateRule,
    batch: Batch,
    counts: Tensor | None,
    groups: array[int],
    numbers: array[float],
) -> Tensor:
    if counts is None and batch.steps:
        counts = torch.stack(list(batch.steps))
    wide = None if counts is None else counts.double()
    shape = (len(groups), len(rule.columns))
    # whatever torch.set_default_device says: C writes there
    scalars = torch.empty(shape, dtype=torch.float32, device="cpu")
    declared("fill_scalars", None, *_ARGUMENTS)(
        STEPS.index((rule.name, len(batch.moments))),
        len(groups),
        groups.buffer_info()[0],
        numbers.buffer_info()[0],
        None if wide is None else wide.data_ptr(),
        scalars.data_ptr(),
    )
    return scalars
