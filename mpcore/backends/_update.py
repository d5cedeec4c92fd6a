"""`plan_update`, `prepare_` and `update_` of the reference backend: fused updates in plain PyTorch.

    x = float32(grad) * coefficient       unscaled and clipped in one multiply
    p = w where w is not rounded p        if asked for: weights that others wrote to, as `adopt_`
    p, moments = decoded                  see `mpcore.stores`: float32 is as it is
    g = x * sign                          sign: -1 where the optimizer maximizes
    p, moments = rule.apply(g, p, ...)    see `mpcore.updates`
    w, moments = encoded                  w of a float32 p: rounded and clamped, as `cast_into`

One tensor after the other, with full-size temporaries: this is the oracle, not the fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mpcore.backends._cast import adopt_
from mpcore.backends._stored import Elements, check_stores, read_elements, write_elements
from mpcore.errors import ArgumentError, StageError
from mpcore.loss_scale import ScaleMove, update_scale_
from mpcore.updates import RULES, Batch, Hyper, UpdateRule, shared_base


@dataclass
class Plan:
    """The batches of one device, and the scalars of their next update.

    Attributes:
        rule: What computes the update.
        batches: What it updates.
        hyper: The hyper-parameters that the scalars were computed from.
        scalars: Per batch the values of `rule.columns` of each tensor, float32
            `[tensors, columns]`; None until `prepare_`.
    """

    rule: UpdateRule
    batches: Sequence[Batch]
    hyper: Hyper | None = None
    scalars: list[Tensor] | None = None

    def __post_init__(self) -> None:
        #: per batch its step counts as one tensor, if they lie in one in this order
        self.counts = [_in_order(batch.steps) for batch in self.batches]
        #: per batch how its tensors are kept
        self.stores = [check_stores(batch) for batch in self.batches]


def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Returns what `update_` needs to know about its tensors; no host sync.

    Args:
        rule: A name in `mpcore.updates.RULES`.
        batches: All of one device. Their tensors stay alive with the plan.

    Raises:
        ArgumentError: There is no such rule, the lists of a batch differ in length, or its tensors
            are not as its stores say.
    """
    if rule not in RULES:
        raise ArgumentError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}.")
    for batch in batches:
        lists = [batch.groups, *batch.moments]
        lists += [part for part in (batch.weights, batch.steps) if part is not None]
        if any(len(part) != len(batch.masters) for part in lists):
            raise ArgumentError("batches: expected lists of one length in each batch.")
    return Plan(RULES[rule], list(batches))


@torch.no_grad()
def prepare_(plan: Plan, hyper: Hyper) -> None:
    """Computes the scalars of the plan's next update from the step counts; no host sync.

    Args:
        plan: From `plan_update`.
        hyper: Hyper-parameters of all param groups. Step counts are read, not advanced.
    """
    plan.hyper = hyper
    counted = zip(plan.batches, plan.counts, strict=True)
    plan.scalars = [_scalars(plan.rule, batch, counts, hyper) for batch, counts in counted]


def _in_order(steps: Sequence[Tensor] | None) -> Tensor | None:
    base = shared_base(steps) if steps else None
    if steps is None or base is None or not base.is_contiguous():
        return None
    first, size = base.data_ptr(), base.element_size()
    if [step.data_ptr() for step in steps] != [first + size * i for i in range(len(steps))]:
        return None
    return base.view(-1)


def _scalars(rule: UpdateRule, batch: Batch, counts: Tensor | None, hyper: Hyper) -> Tensor:
    """Returns the scalars of each tensor, computed at once for neighbours of one param group."""
    device = batch.masters[0].device if batch.masters else None
    rows, stop = [], 0
    for group, members in groupby(batch.groups):
        start, stop = stop, stop + len(list(members))
        like = torch.ones(stop - start, dtype=torch.float64, device=device)
        # filled on the device: numbers that were copied there could wait for it
        numbers = [torch.full_like(like, number) for number in hyper.numbers[group]]
        lr = hyper.lrs[group]
        if lr is not None:
            numbers[0] = lr.reshape(()).double().expand_as(like)
        t = like
        if counts is not None:
            t = counts[start:stop].double() + 1
        elif batch.steps is not None:
            t = torch.stack(list(batch.steps[start:stop])).double() + 1
        columns = [value.expand_as(like).float() for value in rule.scalars(numbers, t)]
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows) if rows else torch.empty(0, len(rule.columns), device=device)


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
    """Updates masters, moments, step counts and weights unless `found_inf` is set; no host sync.

    Args:
        plan: Prepared since its last update.
        grads: A list for each batch, in the order of its masters: 16-bit or float32, left as they
            are. Float32 gradients are multiplied by `coefficient` like all others.
        coefficient: 0-d float32: 1 / loss_scale, times the clip.
        found_inf: 0-d int32. Non-zero means that nothing in the batches changes, but for masters
            by `edits`.
        saturated: 0-d int64. The number of clamped weights is added to it.
        then: How the loss scale moves after the update, which also happens in a skipped step.
        edits: int64 `[weights, 2]`, a row for each 16-bit weight of all batches. Before it is
            updated, also in a skipped step, a weight that somebody else wrote to becomes its
            master, element by element, and is counted: see `adopt_`. None: nobody looks at weights.

    Raises:
        ArgumentError: `edits` is another tensor than that, or masters are not float32 tensors.
        StageError: The plan is not prepared.
    """
    rows_of_edits = split_edits(plan.batches, edits)
    scalars = take_scalars(plan)
    adopt_all(plan.batches, rows_of_edits, adopt_)
    keep = found_inf != 0
    for batch, stores, batch_grads, rows in zip(
        plan.batches, plan.stores, grads, scalars, strict=True
    ):
        columns = [row.unbind() for row in rows.unbind()]
        for i, (grad, s) in enumerate(zip(batch_grads, columns, strict=True)):
            master, moments = read_elements(batch, stores, i)
            g = (grad.float() * coefficient) * s[0]
            param, updated = plan.rule.apply(g, master, moments, s)
            new = Elements(param, list(updated))
            write_elements(batch, stores, i, new, keep=keep, saturated=saturated)
        for step in batch.steps or ():
            step.add_(keep.logical_not())
    if then is not None:
        update_scale_(then, found_inf)


def split_edits(batches: Sequence[Batch], edits: Tensor | None) -> list[Tensor | None]:
    """Returns the rows of `edits` of each batch, None where nobody looks or there are no weights.

    Raises:
        ArgumentError: It is not int64 `[weights, 2]`, contiguous, or masters are not float32.
    """
    if edits is None:
        return [None] * len(batches)
    for batch in batches:
        if batch.store != "float32":
            raise ArgumentError(
                f'edits: expected None with masters kept as "{batch.store}", whose weights are '
                "masters or parts of them: what others write to them is in them already."
            )
    sizes = [0 if batch.weights is None else len(batch.weights) for batch in batches]
    shape = (sum(sizes), 2)
    if edits.shape != shape or edits.dtype != torch.int64 or not edits.is_contiguous():
        raise ArgumentError(
            f"edits: expected int64 {list(shape)}, contiguous, a row for each 16-bit weight, got "
            f"{edits.dtype} {list(edits.shape)}."
        )
    parts = zip(batches, torch.split(edits, sizes), strict=True)
    return [None if batch.weights is None else rows for batch, rows in parts]


def adopt_all(
    batches: Sequence[Batch],
    rows: Sequence[Tensor | None],
    adopt: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None],
) -> None:
    """Makes weights that others wrote to masters, in a pass of its own.

    Args:
        batches: Whose weights.
        rows: From `split_edits`.
        adopt: `adopt_` of a backend.
    """
    for batch, counts in zip(batches, rows, strict=True):
        if batch.weights is not None and counts is not None:
            adopt(batch.weights, batch.masters, counts)


def take_scalars(plan: Plan) -> list[Tensor]:
    """Returns the scalars of a prepared plan, which then needs to be prepared again."""
    scalars, plan.scalars = plan.scalars, None
    if scalars is None:
        raise StageError(
            "update_: expected a plan that was prepared since its last update, got one that was "
            "not. Call prepare_(plan, hyper) first."
        )
    return scalars


def step_counters(batch: Batch) -> list[Tensor]:
    """Returns what counts the steps of a batch: one tensor for all, or one for each.

    Example:
        >>> counts = torch.zeros(2)
        >>> step_counters(Batch([], None, [], list(counts.unbind()), []))[0] is counts
        True
    """
    steps = list(batch.steps or ())
    together = shared_base(steps) if steps else None
    return steps if together is None else [together]
