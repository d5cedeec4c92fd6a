"""Several losses into one model, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mpcore.base import outside_graphs
from mpcore.errors import ArgumentError, LossScaleError
from mpcore.loss_scale.alarm import SkipAlarm
from mpcore.loss_scale.kind import LossScale, initial_state, resumed_state
from mpcore.loss_scale.outputs import scale_outputs
from mpcore.loss_scale.state import LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors


class Watcher(Protocol):
    """Who looks at a training from outside."""

    def see_loss(self, loss: Tensor, name: str) -> None:
        """Notes a loss before it is scaled, and its name."""


class Sums(Protocol):
    """What adds gradients up."""

    @property
    def watcher(self) -> Watcher | None:
        """Who watches."""

    def accumulate(self, caller: str, loss: ScaledLoss | None = None) -> None:
        """Adds the gradients that are there to float32 sums and drops them."""


class Owner(Protocol):
    """The optimizer that a loss belongs to."""

    param_groups: list[dict[str, Any]]

    @property
    def _stage(self) -> Sums: ...


def new_alarm(scaling: LossScale, overflows_at_min: int) -> SkipAlarm:
    """Returns an alarm that does what a loss scale wants, for a state that has that counter."""
    return SkipAlarm(scaling.at_min, overflows_at_min=overflows_at_min)


@dataclass
class Losses:
    """The losses of an optimizer that have a scale of their own.

    Attributes:
        each: By name.
        totals: Counters of the optimizer's steps, whatever losses they had, like those of a loss
            scale; None as long as there is only the optimizer's own loss, which then counts them.
        own_alarm: Of the optimizer's own loss.
    """

    each: dict[str, ScaledLoss] = field(default_factory=dict)
    totals: Tensor | None = None
    own_alarm: SkipAlarm = field(default_factory=SkipAlarm)
    _alarm: SkipAlarm = field(default_factory=SkipAlarm)

    def add(
        self,
        optimizer: Owner,
        name: str,
        scaling: LossScale,
        own: LossScaleTensors,
    ) -> ScaledLoss:
        """Makes another loss and returns it; see `MixedPrecisionOptimizer.add_loss`."""
        if not isinstance(name, str) or not name or name in self.each:
            raise ArgumentError(
                f"name: expected a new one that is not empty, got {name!r}. There are already "
                f"{list(self.each)}."
            )
        if self.totals is None:
            self.totals = own.counters.clone()
        self.each[name] = ScaledLoss(optimizer, name, scaling, own.scale.device)
        return self.each[name]

    def to_states(self) -> dict[str, LossScaleState]:
        """Returns the state of each loss; syncs with the host."""
        return {name: loss.tensors.to_state() for name, loss in self.each.items()}

    def resume(self, states: dict[str, LossScaleState], totals: Sequence[int]) -> None:
        """Overwrites all states with saved ones, as their settings let them go on; no host sync."""
        for name, loss in self.each.items():
            state = resumed_state(loss.scaling, states[name])
            loss.tensors.assign_(state)
            loss.watch(state.overflows_at_min)
        if self.totals is not None:
            for tensor, value in zip(self.totals.unbind(), totals, strict=True):
                tensor.fill_(value)

    def note(self, own: Tensor) -> None:
        """Lets every alarm look at its counters after a step; no host sync.

        Args:
            own: Those of the optimizer's own loss.

        Raises:
            LossScaleError: That of the first alarm that raises; all have looked then.
        """
        errors = []
        if self.totals is not None:
            self._alarm.note(self.totals)
        looks: list[Callable[[], None]] = [partial(self.own_alarm.note, own)]
        looks += [loss.note for loss in self.each.values()]
        for look in looks:
            try:
                look()
            except LossScaleError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class ScaledLoss:
    """One of several losses of an optimizer, with a scale of its own.

    `MixedPrecisionOptimizer.add_loss` makes it. Its `backward` adds gradients to float32 sums,
    which the optimizer's next `step` takes. The step is skipped if any loss of it overflowed; only
    the scales of those that did back off.

    Args:
        optimizer: Whose loss it is.
        name: What checkpoints and reports call it.
        scaling: How its scale moves.
        device: Where the scale is kept.
    """

    def __init__(
        self,
        optimizer: Owner,
        name: str,
        scaling: LossScale,
        device: torch.device,
    ) -> None:
        self.name = name
        self.scaling = scaling
        self.tensors = LossScaleTensors.from_state(initial_state(scaling), device)
        self._optimizer = optimizer
        self.watch(0)

    def watch(self, overflows_at_min: int) -> None:
        """Starts a new alarm, for a state that has that counter."""
        self.alarm = new_alarm(self.scaling, overflows_at_min)

    @outside_graphs
    def backward(
        self,
        loss: Tensor,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Scales, runs the backward pass, adds the unscaled gradients in float32; no host sync.

        Gradients that other losses have left are added first, so order does not matter. `p.grad` is
        None afterwards.

        Args:
            loss: 0-d, any floating dtype.
            retain_graph: As in `Tensor.backward`, like the two others.
            create_graph: See there.
            inputs: See there.

        Raises:
            StageError: Gradients of this step are already unscaled, or some were never scaled.
        """
        stage = self._optimizer._stage
        caller = f"backward() of {self.name!r}"
        stage.accumulate(caller)
        if stage.watcher is not None:
            stage.watcher.see_loss(loss, self.name)
        if self.scaling.scales:
            loss = scale_outputs(loss, self.tensors.scale)
        try:
            loss.backward(  # type: ignore[no-untyped-call]
                retain_graph=retain_graph, create_graph=create_graph, inputs=inputs
            )
            stage.accumulate(caller, self)
        except BaseException:
            # gradients of another scale than what may follow
            for group in self._optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None
            raise

    @property
    def loss_scale(self) -> float:
        """The scale of its next backward pass; reading it syncs with the host."""
        return float(self.tensors.scale)

    @property
    def steps(self) -> int:
        """Steps that it took part in; syncs."""
        return int(self.tensors.count("steps"))

    @property
    def skipped_steps(self) -> int:
        """How many of them were skipped because of it; syncs."""
        return int(self.tensors.count("skipped_steps"))

    def note(self) -> None:
        """Lets the alarm look at the counters after a step; no host sync."""
        self.alarm.note(self.tensors.counters)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "alarm"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.watch(int(self.tensors.count("overflows_at_min")))

    def __repr__(self) -> str:
        return f"ScaledLoss({self.name!r}, {self.scaling})"
