"""Fused updates of the cpu backend: torch's own fused kernels, block by block.

    scratch = float32(grad) * coefficient       in the cache
    torch's fused kernel on (master, scratch, moments)
    weight = rounded master                     while it is in the cache

Bitwise oracle: `torch.optim.X(fused=True)` over float32 copies with the unscaled gradients. A rule
without such a kernel runs in plain torch, with the bits of the reference backend.

Torch's kernels could unscale on the way, by a division (`grad_scale`). That saves 4 % of a step and
loses that a step multiplies by the coefficient exactly as `grads()` and every other backend do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpcore.backends import _update
from mpcore.backends._blocks import (
    CHUNK,
    Piece,
    blocks,
    copy_all,
    cut,
    layout,
    memory_order,
    new_scratch,
    none_reaches,
)
from mpcore.backends._cast import adopt_, cast_into
from mpcore.backends._stored import check_plain
from mpcore.loss_scale import ScaleMove, update_scale_
from mpcore.updates import Batch, Hyper, UpdateRule


@dataclass
class _Block:
    """Pieces of tensors that one call updates."""

    pieces: list[Piece]
    masters: list[Tensor]
    weights: list[Tensor] | None
    moments: list[list[Tensor]]


@dataclass
class _Group:
    """The tensors of one batch that share a param group, and how they are cut."""

    number: int
    members: list[int]
    blocks: list[_Block]


@dataclass
class Plan(_update.Plan):
    """A plan of the reference backend, and its batches by param group."""

    groups: list[list[_Group]] = field(default_factory=list)
    counters: list[list[Tensor]] = field(default_factory=list)  # what counts the steps of a batch
    elements: int = 0


def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Returns what `update_` needs to know about its tensors; see the reference backend.

    Raises:
        BackendError: Masters or moments are not float32: torch's kernels know nothing else.
    """
    check_plain(batches, "cpu", 'backend="compiled" or backend="reference"')
    checked = _update.plan_update(rule, batches)
    plan = Plan(checked.rule, checked.batches)
    # plain torch needs several temporaries of the size of a block
    chunk = CHUNK if plan.rule.has_torch_kernel else CHUNK // 8
    plan.groups = [_groups(batch, chunk) for batch in plan.batches]
    plan.counters = [_update.step_counters(batch) for batch in plan.batches]
    plan.elements = sum(master.numel() for batch in plan.batches for master in batch.masters)
    return plan


@torch.no_grad()
def _groups(batch: Batch, chunk: int) -> list[_Group]:
    members: dict[int, list[int]] = {}
    for index, group in enumerate(batch.groups):
        members.setdefault(group, []).append(index)
    return [
        _Group(number, here, list(_blocks(batch, here, chunk))) for number, here in members.items()
    ]


def _blocks(batch: Batch, members: list[int], chunk: int) -> Iterator[_Block]:
    def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
        # not views of the parameters: a view would keep torch from swapping them for others
        return [memory_order(tensors[index].data) for index in members]

    masters = flat(batch.masters)
    weights = None if batch.weights is None else flat(batch.weights)
    moments = [flat(moment) for moment in batch.moments]
    for pieces in blocks([master.numel() for master in masters], chunk):
        yield _Block(
            pieces,
            cut(masters, pieces),
            None if weights is None else cut(weights, pieces),
            [cut(moment, pieces) for moment in moments],
        )


def prepare_(plan: Plan, hyper: Hyper) -> None:
    """Takes the hyper-parameters of the next update; see the reference backend."""
    numbers = [
        row if lr is None else (float(lr), *row[1:])
        for row, lr in zip(hyper.numbers, hyper.lrs, strict=True)
    ]
    plan.hyper = Hyper(tuple(numbers), tuple(None for _ in numbers))
    if plan.rule.has_torch_kernel:
        plan.scalars = []  # torch's kernels compute their own
    else:
        _update.prepare_(plan, plan.hyper)


@torch.no_grad()
def update_(
    plan: Plan,
    grads: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    found_inf: Tensor,
    saturated: Tensor,
    then: ScaleMove | None = None,
    edits: Tensor | None = None,
) -> None:
    """Updates masters, moments, step counts and weights unless `found_inf` is set; CPU tensors.

    Args:
        plan: See the reference backend, also for the others.
        grads: See there.
        coefficient: See there.
        found_inf: See there.
        saturated: See there.
        then: See there.
        edits: See there.
    """
    rows_of_edits = _update.split_edits(plan.batches, edits)
    scalars = _update.take_scalars(plan)
    _update.adopt_all(plan.batches, rows_of_edits, adopt_)
    if not bool(found_inf):
        scratch = new_scratch([plan.elements])
        for index, (batch, groups) in enumerate(zip(plan.batches, plan.groups, strict=True)):
            if batch.steps:
                torch._foreach_add_(plan.counters[index], 1)
            for group in groups:
                flat = [memory_order(grads[index][i]) for i in group.members]
                steps = [batch.steps[i] for i in group.members] if batch.steps else []
                rows = scalars[index][group.members] if scalars else None
                _update_group(
                    plan,
                    group,
                    flat,
                    steps,
                    rows,
                    coefficient=coefficient,
                    saturated=saturated,
                    scratch=scratch,
                )
    if then is not None:
        update_scale_(then, found_inf)


def _update_group(
    plan: Plan,
    group: _Group,
    grads: list[Tensor],
    steps: list[Tensor],
    rows: Tensor | None,
    coefficient: Tensor,
    saturated: Tensor,
    scratch: Tensor,
) -> None:
    numbers = plan.hyper.numbers[group.number] if plan.hyper is not None else ()
    scaled = float(coefficient) != 1.0
    for block in group.blocks:
        here = layout(block.pieces, scratch)
        copy_all(here, cut(grads, block.pieces))
        if scaled:
            scratch[: sum(piece.numel() for piece in here)].mul_(coefficient)
        if rows is None:
            counts = [steps[piece.index] for piece in block.pieces] if steps else []
            plan.rule.update_with_torch(numbers, block.masters, here, block.moments, counts)
        else:
            _apply(plan.rule, block, here, rows)
        if block.weights is not None:
            _round(block.masters, block.weights, scratch, saturated)


def _apply(rule: UpdateRule, block: _Block, grads: list[Tensor], rows: Tensor) -> None:
    """Updates a block with the arithmetic of the reference backend."""
    for i, piece in enumerate(block.pieces):
        s = rows[piece.index].unbind()
        old = [moment[i] for moment in block.moments]
        param, updated = rule.apply(grads[i] * s[0], block.masters[i], old, s)
        block.masters[i].copy_(param)
        for moment, value in zip(old, updated, strict=True):
            moment.copy_(value)


def _round(
    masters: list[Tensor], weights: list[Tensor], scratch: Tensor, saturated: Tensor
) -> None:
    """Rounds masters into weights; the exact search for clamped ones is for large weights only."""
    if none_reaches(masters, scratch, torch.finfo(weights[0].dtype).max):
        copy_all(weights, masters)
    else:
        cast_into(masters, weights, torch.zeros((), dtype=torch.int32, device="cpu"), saturated)
