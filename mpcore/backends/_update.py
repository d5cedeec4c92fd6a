"""`plan_update`, `prepare_` and `update_` of the reference backend: fused updates in plain PyTorch.

    x = float32(grad) * coefficient       unscaled and clipped in one multiply
    g = x * sign                          sign: -1 where the optimizer maximizes
    p, moments = rule.apply(g, p, ...)    see `mpcore.updates`
    w = rounded and clamped p             as `cast_into`

One tensor after the other, with full-size temporaries: this is the oracle, not the fast path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends._cast import cast_into
from mpcore.backends._scale import ScaleMove, update_scale_
from mpcore.errors import ArgumentError, StageError
from mpcore.updates import RULES, Batch, Hyper, UpdateRule


@dataclass
class Plan:
    """The batches of one device, and the scalars of their next update.

    Attributes:
        rule: What computes the update.
        batches: What it updates.
        hyper: The hyper-parameters that the scalars were computed from.
        scalars: Per batch `[columns, tensors]`, float32; None until `prepare_`.
    """

    rule: UpdateRule
    batches: Sequence[Batch]
    hyper: Hyper | None = None
    scalars: list[Tensor] | None = None


def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Returns what `update_` needs to know about its tensors; no host sync.

    Args:
        rule: A name in `mpcore.updates.RULES`.
        batches: All of one device. Their tensors stay alive with the plan.

    Raises:
        ArgumentError: There is no such rule, or the lists of a batch differ in length.
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
    plan.scalars = [_scalars(plan.rule, batch, hyper) for batch in plan.batches]


def _scalars(rule: UpdateRule, batch: Batch, hyper: Hyper) -> Tensor:
    device = batch.masters[0].device
    rows = [hyper.numbers[group] for group in batch.groups]
    numbers = torch.tensor(rows, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
    columns = list(numbers.unbind(dim=1))
    lrs = [hyper.lrs[group] for group in batch.groups]
    if any(lr is not None for lr in lrs):
        own = columns[0].unbind()
        chosen = [a if b is None else b.reshape(()).double() for a, b in zip(own, lrs, strict=True)]
        columns[0] = torch.stack(chosen)
    t = torch.ones_like(columns[0])
    if batch.steps is not None:
        t = torch.stack(list(batch.steps)).double() + 1
    values = rule.scalars(columns, t)
    return torch.stack([value.expand_as(t).float() for value in values])


@torch.no_grad()
def update_(
    plan: Plan,
    grads: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    found_inf: Tensor,
    saturated: Tensor,
    then: ScaleMove | None = None,
) -> None:
    """Updates masters, moments, step counts and weights unless `found_inf` is set; no host sync.

    Args:
        plan: Prepared since its last update.
        grads: A list for each batch, in the order of its masters: 16-bit or float32, left as they
            are. Float32 gradients are multiplied by `coefficient` like all others.
        coefficient: 0-d float32: 1 / loss_scale, times the clip.
        found_inf: 0-d int32. Non-zero means that nothing in the batches changes.
        saturated: 0-d int64. The number of clamped weights is added to it.
        then: How the loss scale moves after the update, which also happens in a skipped step.

    Raises:
        StageError: The plan is not prepared.
    """
    scalars = take_scalars(plan)
    keep = found_inf != 0
    for batch, batch_grads, columns in zip(plan.batches, grads, scalars, strict=True):
        for i, (master, grad) in enumerate(zip(batch.masters, batch_grads, strict=True)):
            s = columns[:, i].unbind()
            moments = [moment[i] for moment in batch.moments]
            g = (grad.float() * coefficient) * s[0]
            param, updated = plan.rule.apply(g, master, moments, s)
            for old, new in zip((master, *moments), (param, *updated), strict=True):
                torch.where(keep, old, new, out=old)
        for step in batch.steps or ():
            step.add_(keep.logical_not())
        if batch.weights is not None:
            cast_into(batch.masters, batch.weights, found_inf, saturated)
    if then is not None:
        update_scale_(**then.arguments(), found_inf=found_inf)


def take_scalars(plan: Plan) -> list[Tensor]:
    """Returns the scalars of a prepared plan, which then needs to be prepared again."""
    scalars, plan.scalars = plan.scalars, None
    if scalars is None:
        raise StageError("update_: expected a plan that was prepared since its last update.")
    return scalars
