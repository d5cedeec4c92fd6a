"""`plan_update` and `update_` of the compiled backend: one call of C for all tensors of a batch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends import _update
from mpcore.backends._blocks import all_in_memory_order
from mpcore.backends._c_adopt import adopt_
from mpcore.backends._c_compiler import passes
from mpcore.backends._c_scale import update_scale_
from mpcore.backends._c_source import STEPS
from mpcore.backends._c_stores import Held
from mpcore.backends._c_work import DTYPES, Table, Work, by_dtype, run
from mpcore.base import SIXTEEN_BIT, GradientSet
from mpcore.errors import ArgumentError
from mpcore.loss_scale import ScaleMove
from mpcore.updates import Batch

# 16-bit weights of this many elements fill the last cache before the next forward pass reads them
_STREAMING = 2**24


@dataclass(kw_only=True)
class Plan(_update.Plan):
    """A plan of the reference backend, with the addresses of its tensors.

    Attributes:
        tables: Per batch masters, then weights if there are any, then moments.
        counters: Per batch what counts its steps.
        shapes: Per batch those of its masters.
        held: Per batch what C has to know of its stores.
        groups: Per batch the param group of each tensor, as C has an array of integers.
        elements: Of all masters together.
    """

    tables: list[Table]
    counters: list[list[Tensor]]
    shapes: list[list[torch.Size]]
    held: list[Held]
    groups: list[array[int]]
    elements: int


@torch.no_grad()
def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Returns what `update_` needs to know about its tensors; see the reference backend."""
    plan = _update.plan_update(rule, batches)
    held = [Held.of(*part) for part in zip(plan.batches, plan.stores, strict=True)]
    tables = [_table(batch, kept.rows) for batch, kept in zip(plan.batches, held, strict=True)]
    counters = [_update.step_counters(batch) for batch in plan.batches]
    elements = sum(master.numel() for batch in plan.batches for master in batch.masters)
    shapes = [[master.shape for master in batch.masters] for batch in plan.batches]
    return Plan(
        rule=plan.rule,
        batches=plan.batches,
        tables=tables,
        counters=counters,
        shapes=shapes,
        held=held,
        groups=[array("q", batch.groups) for batch in plan.batches],
        elements=elements,
    )


def _table(batch: Batch, rows: Sequence[int]) -> Table:
    roles = [batch.masters, *([] if batch.weights is None else [batch.weights]), *batch.moments]
    # not views of the parameters: a view would keep torch from swapping them for others
    return Table.of([[tensor.data for tensor in role] for role in roles], rows)


def update_(
    plan: Plan,
    grads: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    found_inf: Tensor,
    saturated: Tensor,
    then: ScaleMove | None = None,
    edits: Tensor | None = None,
) -> None:
    """Updates in one pass over memory; CPU tensors, see `reference`.

    Bitwise `mpcore.backends.reference.update_`, which documents the arguments.

    Raises:
        ArgumentError: A gradient is missing, or of another shape or dtype, or `edits` is.
        BackendError: The compiler refused.
        StageError: The plan is not prepared.
    """
    checked = zip(plan.batches, plan.shapes, grads, strict=True)
    flat = [_checked(batch, shapes, here) for batch, shapes, here in checked]
    rows_of_edits = _update.split_edits(plan.batches, edits)
    pass_over = passes().update  # before anything is written: a compiler may refuse
    scalars = _update.take_scalars(plan)
    if bool(found_inf):
        _update.adopt_all(plan.batches, rows_of_edits, adopt_)
    else:
        for index, here in enumerate(flat):
            if plan.counters[index]:
                torch._foreach_add_(plan.counters[index], 1)
            work = _shared_work(
                plan,
                index,
                tensors=len(here),
                scalars=scalars[index],
                coefficient=coefficient,
                saturated=saturated,
                edits=rows_of_edits[index],
            )
            for dtype, cut, addresses in by_dtype(here, plan.tables[index].cut):
                work.take_up(dtype, cut, addresses)
                run(pass_over, work)
    if then is not None:
        update_scale_(then, found_inf)


def _checked(batch: Batch, shapes: list[torch.Size], grads: Sequence[Tensor]) -> GradientSet:
    """Returns gradients as they lie in memory; raises if C would read behind their ends."""
    if len(grads) != len(batch.masters):
        raise ArgumentError(
            f"grads: expected one for each of {len(batch.masters)} masters, got {len(grads)}."
        )
    grads = GradientSet.of(grads)
    if grads.shapes == shapes and grads.dtypes <= DTYPES.keys():
        return all_in_memory_order(grads)
    for index, (grad, shape) in enumerate(zip(grads, shapes, strict=True)):
        if grad.shape != shape or grad.dtype not in (*SIXTEEN_BIT, torch.float32):
            raise ArgumentError(
                f"grads[{index}]: expected {list(shape)} in float16, bfloat16 or float32, "
                f"got {list(grad.shape)} in {grad.dtype}."
            )
    return all_in_memory_order(grads)


def _shared_work(
    plan: Plan,
    index: int,
    tensors: int,
    scalars: Tensor,
    coefficient: Tensor,
    saturated: Tensor,
    edits: Tensor | None,
) -> Work:
    """Returns what all dtypes of a batch share."""
    batch, held = plan.batches[index], plan.held[index]
    weights, count = batch.weights, len(batch.moments)
    table, scalars = plan.tables[index], scalars.contiguous()
    masters, role = table.addresses.buffer_info()[0], 8 * table.count  # bytes of a role's addresses
    work = Work(
        masters=masters,
        moments=masters + role * (2 if weights else 1),
        weights=masters + role if weights else held.own_weights(masters),
        weight_dtype=DTYPES[weights[0].dtype] if weights else held.own_dtype,
        step=STEPS.index((plan.rule.name, count)),
        scalars=scalars.data_ptr(),
        saturated=saturated.data_ptr(),
        edits=None if edits is None else edits.data_ptr(),
        tensors=tensors,
        coefficient=float(coefficient),
        # a weight that is read before it is written is in the cache anyhow
        streaming=plan.elements >= _STREAMING and batch.store == "float32",
    )
    memory = [table.addresses, scalars, saturated, *held.put_into(work, batch, plan.counts[index])]
    memory += [] if edits is None else [edits]
    work.keep(*memory)
    return work
