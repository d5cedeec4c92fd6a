"""A golden run: a few parameters, trained through the public interface alone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.golden.cases import Case
from mpcore_testing.golden.plans import Pass, linear_loss
from mpcore_testing.golden.values import numbers

#: What a learning rate is multiplied by in each step; no schedule of torch's computes it.
SCHEDULE = (1.0, 1.0, 0.75, 0.5, 0.875, 0.3, 0.7, 0.1, 0.6, 0.9)


def factor(step: int) -> float:
    """The schedule."""
    return SCHEDULE[step]


@dataclass(frozen=True)
class Snapshot:
    """What a run holds after a step.

    Attributes:
        masters: By parameter, float32.
        moments: By parameter and name; none before they exist.
        weights: By parameter, in its own dtype.
        scale: Of the optimizer, of its losses, of the scaler; those that there are.
        counters: Steps, skipped ones, skips in a row, saturated weights; steps and skips of each
            loss; step counts of the parameters, 0 where there is none.
        norm: What the clip returned, or nothing.
    """

    masters: list[Tensor]
    moments: list[Tensor]
    weights: list[Tensor]
    scale: list[float]
    counters: list[int]
    norm: list[Tensor]


class Training:
    """A case on a backend.

    Args:
        case: What is trained.
        backend: By name; "none": the case's optimizer itself, without a wrapper or a schedule.
        path: "fused" or "general".
        resumed: Whether everything is saved and loaded into new objects wherever it can be.
    """

    def __init__(
        self, case: Case, backend: str, *, path: str = "fused", resumed: bool = False
    ) -> None:
        self.case, self.backend, self.path, self.resumed = case, backend, path, resumed
        self.number = 0
        self.scaler: Any = None
        first = [numbers(shape, 1, i) for i, shape in enumerate(case.shapes)]
        self._build([w.to(dtype) for w, dtype in zip(first, case.dtypes, strict=True)])

    def _build(self, weights: list[Tensor]) -> None:
        self.params = [nn.Parameter(weight.clone()) for weight in weights]
        self.optimizer: Any = self.case.rule.build(self.params)
        if self.backend != "none":
            self.optimizer = mpcore.MixedPrecisionOptimizer(
                self.optimizer, self.case.scale, backend=self.backend, path=self.path
            )
            self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.case.begin(self)

    def loss(self, one: Pass, number: int) -> Tensor:
        """Returns a loss with the gradients of a pass of this step."""
        return linear_loss(self.params, one.gradients(self.params, self.number, number))

    def pause(self) -> None:
        """A moment at which training may be saved and go on in another process."""
        if not self.resumed:
            return
        file = io.BytesIO()
        torch.save((self.params, self.optimizer.state_dict(), self.schedule.state_dict()), file)
        file.seek(0)
        params, optimizer, schedule = torch.load(file)
        self._build([param.detach() for param in params])
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)

    def run(self) -> Iterator[Snapshot]:
        """Yields what there is after each step."""
        for number, step in enumerate(self.case.plan):
            self.number = number
            norm = self.case.loop(self, step)
            if self.backend != "none":
                self.schedule.step()
            self.pause()
            yield self._snapshot(norm)

    def _snapshot(self, norm: Tensor | None) -> Snapshot:
        states = [dict(self.optimizer.state.get(param, {})) for param in self.params]
        masters = [s.pop("master", p) for s, p in zip(states, self.params, strict=True)]
        counts = [int(state.pop("step", 0)) for state in states]
        moments = [state[name] for state in states for name in sorted(state)]
        scale, counters = [], []
        if self.backend != "none":
            own = self.optimizer
            scale = [own.loss_scale, *(loss.loss_scale for loss in own.losses.values())]
            counters = [own.steps, own.skipped_steps, own.skips_in_a_row, own.saturated]
            for loss in own.losses.values():
                counters += [loss.steps, loss.skipped_steps]
        if self.scaler is not None:
            scale.append(self.scaler.get_scale())
        return Snapshot(
            masters=_copies(masters),
            moments=_copies([moment for moment in moments if moment is not None]),
            weights=_copies(self.params),
            scale=scale,
            counters=[*counters, *counts],
            norm=[] if norm is None else _copies([norm]),
        )


def _copies(tensors: list[Any]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
