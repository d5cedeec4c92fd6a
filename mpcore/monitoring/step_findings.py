"""The findings of a step, in the order of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpcore.engine import Look, MixedPrecisionOptimizer, StepGradients
from mpcore.monitoring.findings import Columns, Finding, FindingTable
from mpcore.monitoring.pass_counts import PassCounts


def findings_of(
    gradients: StepGradients,
    scale: float,
    optimizer: MixedPrecisionOptimizer,
    model: nn.Module | None,
    name_of: Callable[[Tensor], str],
    counts: PassCounts | None = None,
) -> Sequence[Finding]:
    """Returns what a look at the gradients of a step has found; syncs with the host.

    Args:
        gradients: Of the step.
        scale: The loss scale they have.
        optimizer: Whose they are.
        model: Whose order is taken; None: that of the param groups.
        name_of: Names a parameter.
        counts: What was counted in its backward passes, if they were added up.
    """
    sums = gradients.accumulated is not None
    looks = gradients.findings.looks()
    columns = [Columns(list(map(name_of, look.params)), look, scale, sums=sums) for look in looks]
    params = [param for look in looks for param in look.params]
    place_of = dict(zip(map(id, params), range(len(params)), strict=True))
    of_model = [] if model is None else model.parameters()
    order = dict.fromkeys(map(id, [*of_model, *optimizer._params()]))
    table = FindingTable(columns, [place_of[key] for key in order if key in place_of])
    if not counts:
        return table
    by_id = {id(param): param for param in params}
    found = [by_id[key] for key in order if key in place_of]
    return tuple(counts.merged(list(zip(found, table, strict=True)), name_of))


def norm_of(looks: Sequence[Look], device: torch.device) -> Tensor:
    """Returns the 2-norm of all that was looked at, 0-d float64, NaN if nothing was; no sync."""
    squares = [look.found.square_sum.sum().to(device) for look in looks]
    unknown = torch.full((), torch.nan, dtype=torch.float64, device=device)
    return torch.stack(squares).sum().sqrt() if squares else unknown
