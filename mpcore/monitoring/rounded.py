"""What rounding weights alone does to a step: whatever computes with 16-bit weights has that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.monitoring.left_alone import LeftAlone
from mpcore.monitoring.probe import Probe
from mpcore.monitoring.survey import Survey, difference_of


def moved_by_rounding(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[[Any], Tensor],
    survey: Survey,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Returns by how much loss and gradients move if weights are rounded; syncs with the host.

    All else is computed in float32. Near a minimum gradients vanish, and their difference is a
    large share of them however a step computes; masters keep what rounded weights do not have.

    Args:
        model: In float32; left as it is.
        batch: Of the survey.
        loss_of: Likewise.
        survey: Of the step in float32.
        dtype: What is rounded to.

    Example:
        >>> from mpcore.monitoring.survey import survey_of
        >>> model, batch = nn.Linear(1, 1), torch.ones(1, 1)
        >>> with torch.no_grad():
        ...     for param in model.parameters():
        ...         _ = param.fill_(1.0)
        >>> survey = survey_of(model, batch, torch.sum)
        >>> moved_by_rounding(model, batch, torch.sum, survey, torch.float16)
        (0.0, 0.0)
    """
    found: list[tuple[float, float]] = []

    def judge(loss: Tensor) -> None:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(
            (abs(float(loss) - survey.loss), difference_of(grads, survey.gradients) or 0.0)
        )

    with LeftAlone(model):
        for param in model.parameters():
            if param.is_floating_point():
                param.data = param.data.to(dtype).to(param.dtype)
        Probe(model, batch, loss_of).run(_nothing, _nothing, after=judge)
    return found[0]


def _nothing(*what: Any) -> None:
    """Looks at nothing."""
