"""`plan_update` and `update_` of the compiled backend: one call of C for all tensors of a batch."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends import _update
from mpcore.backends._blocks import all_in_memory_order
from mpcore.backends._c_adopt import adopt_
from mpcore.backends._c_compiler import declared, passes
from mpcore.backends._c_scale import update_scale_
from mpcore.backends._c_source import STEPS
from mpcore.backends._c_stores import Held
from mpcore.backends._c_work import DTYPES, Table, Work, by_dtype, run
from mpcore.base import SIXTEEN_BIT, GradientSet, Kinds
from mpcore.errors import ArgumentError
from mpcore.loss_scale import ScaleMove
from mpcore.updates import Batch

# 16-bit weights of this many elements fill the last cache before the next forward pass reads them
_STREAMING = 2**24


@dataclass(kw_only=True)
class Part:
    """A batch as C knows it: what stays the same from step to step.

    Attributes:
        batch: The tensors.
        table: Where masters lie, then weights if there are any, then moments.
        held: What C has to know of its stores.
        counters: What counts its steps.
        counts: Its steps as one tensor, if they lie in one in this order.
        shapes: Those of its masters.
        groups: The param group of each tensor, as C has an array of integers.
        scalars: Room for those of the next update.
        step: What C calls its update.
        work: What threads share, but for gradients, coefficient and counts.
    """

    batch: Batch
    table: Table
    held: Held
    counters: list[Tensor]
    counts: Tensor | None
    shapes: list[torch.Size]
    groups: array[int]
    scalars: Tensor
    step: int
    work: Work
    _fitting: Kinds | None = None  # of gradients that were found to be right

    @staticmethod
    def of(plan: _update.Plan, index: int, *, streaming: bool) -> Part:
        """Returns a batch of a plan; `streaming` as in C."""
        batch, stores = plan.batches[index], plan.stores[index]
        held = Held.of(batch, stores)
        table = _table(batch, held.rows)
        shape = (len(batch.masters), len(plan.rule.columns))
        counts = plan.counts[index]
        part = Part(
            batch=batch,
            table=table,
            held=held,
            counters=_update.step_counters(batch),
            counts=counts if counts is not None and counts.dtype == torch.float32 else None,
            shapes=[master.shape for master in batch.masters],
            groups=array("q", batch.groups),
            # whatever torch.set_default_device says: C writes there
            scalars=torch.empty(shape, dtype=torch.float32, device="cpu"),
            step=STEPS.index((plan.rule.name, len(batch.moments))),
            work=Work(tensors=len(batch.masters), streaming=streaming and batch.store == "float32"),
        )
        part._fill_work()
        return part

    def _fill_work(self) -> None:
        batch, held, work, table = self.batch, self.held, self.work, self.table
        masters, role = table.addresses.buffer_info()[0], 8 * table.count  # bytes of addresses
        work.masters = masters
        work.moments = masters + role * (2 if batch.weights else 1)
        work.weights = masters + role if batch.weights else held.own_weights(masters)
        work.weight_dtype = DTYPES[batch.weights[0].dtype] if batch.weights else held.own_dtype
        work.step = self.step
        work.scalars = self.scalars.data_ptr()
        memory = held.put_into(work)
        work.keep(table.addresses, self.scalars, *memory)

    def count_step(self) -> None:
        """Counts an update of each tensor."""
        if self.counts is None:
            if self.counters:
                torch._foreach_add_(self.counters, 1)
            return
        count = declared("count_steps", None, ctypes.c_void_p, ctypes.c_int64)
        count(self.counts.data_ptr(), self.counts.shape[0])
        torch.autograd.graph.increment_version((self.counts,))  # writes by address tell nothing

    def checked(self, grads: Sequence[Tensor]) -> GradientSet:
        """Returns gradients as they lie in memory; raises if C would read behind their ends."""
        grads = GradientSet.of(grads)
        if grads.kinds is not None and grads.kinds is self._fitting:
            return grads
        if len(grads) != len(self.shapes):
            raise ArgumentError(
                f"grads: expected one for each of {len(self.shapes)} masters, got {len(grads)}."
            )
        if grads.shapes == self.shapes and grads.dtypes <= DTYPES.keys():
            if grads.kinds is not None and grads.are_contiguous and len(grads.dtypes) == 1:
                self._fitting = grads.kinds
            return all_in_memory_order(grads)
        for index, (grad, shape) in enumerate(zip(grads, self.shapes, strict=True)):
            if grad.shape != shape or grad.dtype not in (*SIXTEEN_BIT, torch.float32):
                raise ArgumentError(
                    f"grads[{index}]: expected {list(shape)} in float16, bfloat16 or float32, "
                    f"got {list(grad.shape)} in {grad.dtype}."
                )
        return all_in_memory_order(grads)


@dataclass(kw_only=True)
class Plan(_update.Plan):
    """A plan of the reference backend, with the addresses of its tensors.

    Attributes:
        parts: The batches as C knows them.
    """

    parts: list[Part]

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = [group for batch in self.batches for group in batch.groups]
        self.first_group, self.last_group = min(groups, default=0), max(groups, default=0)


@torch.no_grad()
def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Returns what `update_` needs to know about its tensors; see the reference backend."""
    plan = _update.plan_update(rule, batches)
    elements = sum(master.numel() for batch in plan.batches for master in batch.masters)
    many = range(len(plan.batches))
    parts = [Part.of(plan, index, streaming=elements >= _STREAMING) for index in many]
    return Plan(rule=plan.rule, batches=plan.batches, parts=parts)


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
    flat = [part.checked(here) for part, here in zip(plan.parts, grads, strict=True)]
    rows_of_edits = _update.split_edits(plan.batches, edits)
    pass_over = passes().update  # before anything is written: a compiler may refuse
    _update.take_scalars(plan)
    if bool(found_inf):
        _update.adopt_all(plan.batches, rows_of_edits, adopt_)
    else:
        factor = float(coefficient)
        for part, here, rows in zip(plan.parts, flat, rows_of_edits, strict=True):
            part.count_step()
            work = part.work
            work.coefficient, work.saturated = factor, saturated.data_ptr()
            work.edits = None if rows is None else rows.data_ptr()
            drawn = part.held.draw_into(work, part.batch, part.counts)
            for dtype, cut, addresses in by_dtype(here, part.table.cut):
                work.take_up(dtype, cut, addresses)
                run(pass_over, work)
            del drawn
    if then is not None:
        update_scale_(then, found_inf)
