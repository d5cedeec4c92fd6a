"""`prepare_` of the compiled backend: the scalars of all tensors of a batch in one call of C."""

from __future__ import annotations

import ctypes
from array import array
from itertools import chain

import torch
from torch import Tensor

from mpcore.backends._c_compiler import declared
from mpcore.backends._c_update import Part, Plan
from mpcore.updates import Hyper

_ARGUMENTS = (ctypes.c_int32, ctypes.c_int64, *[ctypes.c_void_p] * 4)


def prepare_(plan: Plan, hyper: Hyper) -> None:
    """Computes the scalars of the plan's next update; bitwise `reference.prepare_`. CPU tensors.

    Args:
        plan: See the reference backend.
        hyper: See there.

    Raises:
        BackendError: The compiler refused.
    """
    rows = hyper.numbers
    if any(lr is not None for lr in hyper.lrs):
        pairs = zip(rows, hyper.lrs, strict=True)
        rows = tuple(row if lr is None else (float(lr), *row[1:]) for row, lr in pairs)
    if not 0 <= plan.first_group <= plan.last_group < len(rows):
        raise IndexError(f"groups: expected some of {len(rows)}, got {plan.last_group}.")
    numbers = array("d", chain.from_iterable(rows))
    plan.scalars = [_scalars(part, numbers) for part in plan.parts]
    plan.hyper = hyper


def _scalars(part: Part, numbers: array[float]) -> Tensor:
    """Returns the scalars of a batch, where they always lie.

    Args:
        part: Whose they are.
        numbers: The hyper-parameters of all param groups.
    """
    counts = part.counts
    if counts is None and part.batch.steps:
        counts = torch.stack(list(part.batch.steps))
    counts = None if counts is None else counts.float()
    declared("fill_scalars", None, *_ARGUMENTS)(
        part.step,
        len(part.groups),
        part.groups.buffer_info()[0],
        numbers.buffer_info()[0],
        None if counts is None else counts.data_ptr(),
        part.scalars.data_ptr(),
    )
    return part.scalars
