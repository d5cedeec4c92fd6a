"""The compiled CPU backend: each update is one pass that torch.compile made of the rule itself.

Every byte crosses memory once: a gradient, master, moments and weight are read, computed with in
registers and written. The arithmetic is the reference backend's, operation by operation (Inductor's
C++ is compiled without contraction), so that backend is the bitwise oracle of `update_`. All other
functions are those of the cpu backend.

The first update of each combination of rule and dtypes compiles: seconds, once per process, and a
C++ compiler must be there. So it is chosen by name, `backend="compiled"`, and pays off in long
runs. Each tensor is a call of its own: thousands of small tensors are better off with "cpu".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from mpcore.backends import cpu
from mpcore.backends._blocks import memory_order
from mpcore.backends._cast import widen_into
from mpcore.backends._inspection import Inspection
from mpcore.backends._scale import ScaleMove, update_scale_
from mpcore.backends._update import Plan, plan_update, prepare_, take_scalars
from mpcore.backends.cpu import cast_into, unscale_, unscale_into
from mpcore.updates import RULES, Batch, Hyper

__all__ = [
    "cast_into",
    "inspect",
    "plan_update",
    "prepare_",
    "unscale_",
    "unscale_into",
    "update_",
    "update_scale_",
    "widen_into",
]

# (grad, master, moments, weight, scalars) -> sum of squares of the new master
_Pass = Callable[[Tensor, Tensor, list[Tensor], Tensor | None, Tensor], Tensor]


@cache
def _compiled(rule: str, moments: int, grad: torch.dtype, weight: torch.dtype | None) -> _Pass:
    """Returns the pass of one combination, compiled when it is first called."""
    apply = RULES[rule].apply

    def one_pass(
        grad: Tensor, master: Tensor, moments: list[Tensor], weight: Tensor | None, s: Tensor
    ) -> Tensor:
        coefficient, *scalars = s.unbind()
        x = (grad.float() * coefficient) * scalars[0]
        param, updated = apply(x, master, moments, scalars, torch.sqrt)
        master.copy_(param)
        for old, new in zip(moments, updated, strict=True):
            old.copy_(new)
        if weight is not None:
            weight.copy_(param)
        return (param * param).sum()

    return torch.compile(one_pass, dynamic=True, fullgraph=True)


def inspect(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    max_norm: float | None,
    *,
    statistics: bool = False,
    plan: Plan | None = None,
    hyper: Hyper | None = None,
) -> Inspection:
    """Finds overflow, norms and the clip of gradients that stay as they are; CPU tensors.

    The cpu backend's `inspect`; `reference.inspect` documents the arguments.
    """
    if plan is not None and hyper is not None:
        prepare_(plan, hyper)
    return cpu.inspect(grads, coefficient, max_norm, statistics=statistics)


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
    scalars = take_scalars(plan)
    if not bool(found_inf):
        for batch, batch_grads, rows in zip(plan.batches, grads, scalars, strict=True):
            with torch._dynamo.config.patch(recompile_limit=64):  # one code for all combinations
                _update_batch(plan.rule.name, batch, batch_grads, rows, coefficient, saturated)
            for step in batch.steps or ():
                step.add_(1)
    if then is not None:
        update_scale_(**then.arguments(), found_inf=found_inf)


def _update_batch(
    rule: str,
    batch: Batch,
    grads: Sequence[Tensor],
    rows: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    saturated: Tensor,
) -> None:
    none = torch.zeros((), dtype=torch.int32)
    for i, (master, grad, row) in enumerate(zip(batch.masters, grads, rows, strict=True)):
        weight = None if batch.weights is None else batch.weights[i]
        if grad.numel() == 0:
            continue
        one_pass = _compiled(
            rule, len(batch.moments), grad.dtype, None if weight is None else weight.dtype
        )
        total = one_pass(
            memory_order(grad),
            memory_order(master),
            [memory_order(moment[i]) for moment in batch.moments],
            None if weight is None else memory_order(weight),
            torch.stack([coefficient, *row]),
        )
        # no element of a vector is longer than the vector: nothing was clamped
        if weight is not None and not float(total) < 0.9 * torch.finfo(weight.dtype).max ** 2:
            cast_into([master], [weight], none, saturated)
