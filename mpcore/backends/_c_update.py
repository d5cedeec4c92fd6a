"""`plan_update` and `update_` of the compiled backend: one call of C for all tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends import _update
from mpcore.backends._blocks import memory_order
from mpcore.backends._c_compiler import load
from mpcore.backends._c_source import update_source
from mpcore.backends._c_work import Table, Work, by_dtype, run
from mpcore.backends._scale import ScaleMove, update_scale_
from mpcore.updates import Batch

# 16-bit weights of this many elements fill the last cache before the next forward pass reads them
_STREAMING = 2**24


@dataclass(kw_only=True)
class Plan(_update.Plan):
    """A plan of the reference backend, with the addresses of its tensors.

    Attributes:
        tables: Per batch masters, then weights if there are any, then moments.
        counters: Per batch what counts its steps.
        elements: Of all masters together.
    """

    tables: list[Table]
    counters: list[list[Tensor]]
    elements: int


@torch.no_grad()
def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Returns what `update_` needs to know about its tensors; see the reference backend."""
    plan = _update.plan_update(rule, batches)
    tables = [_table(batch) for batch in plan.batches]
    counters = [_update.step_counters(batch) for batch in plan.batches]
    elements = sum(master.numel() for batch in plan.batches for master in batch.masters)
    return Plan(plan.rule, plan.batches, tables=tables, counters=counters, elements=elements)


def _table(batch: Batch) -> Table:
    roles = [batch.masters, *([] if batch.weights is None else [batch.weights]), *batch.moments]
    # not views of the parameters: a view would keep torch from swapping them for others
    return Table.of([[tensor.data for tensor in role] for role in roles])


@torch.no_grad()
def update_(
    plan: Plan,
    grads: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    found_inf: Tensor,
    saturated: Tensor,
    then: ScaleMove | None = None,
) -> None:
    """Updates in one pass over memory, compiled when it first runs; CPU tensors, see `reference`.

    Bitwise `mpcore.backends.reference.update_`, which documents the arguments.
    """
    scalars = _update.take_scalars(plan)
    if not bool(found_inf):
        for index, (batch, batch_grads) in enumerate(zip(plan.batches, grads, strict=True)):
            if plan.counters[index]:
                torch._foreach_add_(plan.counters[index], 1)
            flat = [memory_order(grad) for grad in batch_grads]
            _update_batch(plan, index, batch, flat, scalars[index], float(coefficient), saturated)
    if then is not None:
        update_scale_(**then.arguments(), found_inf=found_inf)


def _update_batch(
    plan: Plan,
    index: int,
    batch: Batch,
    grads: list[Tensor],
    scalars: Tensor,
    coefficient: float,
    saturated: Tensor,
) -> None:
    table, count = plan.tables[index], len(batch.moments)
    weight = None if batch.weights is None else batch.weights[0].dtype
    masters, *rest = table.addresses
    moments = torch.cat(rest[len(rest) - count :]) if count else masters
    scalars = scalars.contiguous()
    for dtype, chunks, addresses in by_dtype(grads, table.chunks):
        work = Work.over(chunks, addresses)
        work.masters = masters.data_ptr()
        work.moments = moments.data_ptr()
        work.weights = None if weight is None else rest[0].data_ptr()
        work.scalars = scalars.data_ptr()
        work.saturated = saturated.data_ptr()
        work.tensors = len(grads)
        work.coefficient = coefficient
        work.streaming = plan.elements >= _STREAMING
        run(load(update_source(plan.rule.name, count, dtype, weight)).update, work)
