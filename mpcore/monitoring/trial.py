"""The step that `preflight` promises, run in 16 bits and compared with the one in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.errors import ArgumentError, StageError
from mpcore.monitoring.left_alone import LeftAlone
from mpcore.monitoring.operations import Operation, values_of
from mpcore.monitoring.origins import Event, Origins, is_finite
from mpcore.monitoring.probe import Probe
from mpcore.monitoring.rounded import moved_by_rounding
from mpcore.monitoring.survey import Survey, described, difference_of, name_of
from mpcore.precision import cast_model, is_rounded

#: By how much loss and gradients may differ from those in float32, as shares of these.
_BOUNDS = {torch.float16: (0.02, 0.1), torch.bfloat16: (0.03, 0.25)}
#: Which share of a weight's gradient may become 0.
_FLUSHED = 0.1
_CROWDED = torch.finfo(torch.float16).max / 4
_UNTRIED = "not implemented for"  # what torch says of an operation that a device lacks


@dataclass(frozen=True)
class Trial:
    """A step in 16 bits.

    Attributes:
        dtype: Of the weights.
        loss_scale: What the loss was multiplied by.
        loss: In 16 bits; None if the step could not be run.
        gradient_error: Norm of the difference of the unscaled gradients, as a share of the norm of
            those in float32; None likewise, and if those are 0.
        wrong: What is wrong with it; empty if nothing is.
        untried: Why nobody knows whether it works: what raised; empty if that is known.
        overflowed_back: Whether the loss was finite, and the loss scale too high for a gradient.
        narrow: What was computed, or lay, in 16 bits: names of operations, inputs and buffers.
    """

    dtype: torch.dtype
    loss_scale: float
    loss: float | None = None
    gradient_error: float | None = None
    wrong: str = ""
    untried: str = ""
    overflowed_back: bool = False
    narrow: frozenset[str] = frozenset()

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.loss is None:
            return (
                f"{name} was not tried: {self.untried}" if self.untried else f"{name}: {self.wrong}"
            )
        off = ""
        if self.gradient_error is not None:
            off = f", gradients {self.gradient_error:.2%} off those of float32"
        verdict = f": {self.wrong}" if self.wrong else ""
        return f"{name} was tried: loss {self.loss:.6g}{off}{verdict}"


def try_out(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[[Any], Tensor],
    survey: Survey,
    dtype: torch.dtype,
    loss_scale: float,
) -> Trial:
    """Casts a model, runs a step, casts it back; syncs many times.

    Args:
        model: In float32; it is as before afterwards, hooks and addresses of weights included.
        batch: A tensor, a tuple of positional or a mapping of keyword arguments.
        loss_of: Returns the loss from the model's output.
        survey: Of the same step in float32.
        dtype: float16 or bfloat16.
        loss_scale: What the loss is multiplied by in float32.

    Example:
        >>> from mpcore.monitoring.survey import survey_of
        >>> model, batch = nn.Linear(2, 1), torch.ones(1, 2)
        >>> survey = survey_of(model, batch, torch.sum)
        >>> try_out(model, batch, torch.sum, survey, torch.float16, 8.0).wrong
        ''
    """
    with LeftAlone(model), warnings.catch_warnings():
        try:
            # of what it rounds or makes infinite it is the result that tells
            warnings.filterwarnings("ignore", "cast_model: ", UserWarning)
            cast_model(model, dtype)
            attempt = _Attempt(model, batch, loss_of, survey, dtype, loss_scale)
        except (ArgumentError, StageError, RuntimeError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if isinstance(error, StageError) or _UNTRIED in str(error):
                return Trial(dtype, loss_scale, untried=text)
            return Trial(dtype, loss_scale, wrong=f"a step raises {text}")
    trial = attempt.judged((0.0, 0.0))
    if trial.gradient_error is None or not trial.wrong:
        return trial
    return attempt.judged(moved_by_rounding(model, batch, loss_of, survey, dtype))


class _Attempt:
    """One step, and what was seen on the way."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_of: Callable[[Any], Tensor],
        survey: Survey,
        dtype: torch.dtype,
        loss_scale: float,
    ) -> None:
        self._survey = survey
        self._dtype = dtype
        self._scale = loss_scale
        self._parameters = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        self._narrow = {f"buffer {name}" for name, t in buffers.items() if t.dtype == dtype}
        self._crowded = ""
        self._loss = 0.0
        self._error: float | None = None
        self._grads: dict[str, Tensor] = {}
        self._bad = self._lost = False
        self._source: Event | None = None
        probe = Probe(model, batch, loss_of)
        named = probe.named()
        self._origins = Origins(named)
        self._narrow |= {name for name, tensor in named if is_rounded(model, tensor)}
        probe.run(_ignored, self._see, loss_scale=loss_scale, after=self._judge)

    def _see(self, operation: Operation) -> None:
        event = self._origins.see(operation)
        place = operation.place
        seen = map(values_of, operation.outputs)
        outputs = [t for t in seen if t is not None and t.dtype == self._dtype]
        if place.phase == "backward" or operation.is_view or not outputs:
            return
        name = name_of(operation)
        self._narrow.add(name)
        if event is None and self._dtype == torch.float16 and not self._crowded:
            # what is infinite is judged by what it does
            largest = max(map(_largest, outputs))
            if largest > _CROWDED:
                self._crowded = f"{name} reaches {largest:.3g}, and float16 ends at 65504"
        if operation.name.startswith("cast"):
            self._narrow |= {self._origins.name_of(given) for given, _ in operation.inputs}

    def _judge(self, loss: Tensor) -> None:
        grads = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        self._loss, self._lost = float(loss), not is_finite(loss)
        self._bad = self._lost or not all(map(is_finite, grads.values()))
        self._narrow |= {"loss"} if loss.dtype == self._dtype else set()
        if self._bad:
            results = [loss] if self._lost else list(grads.values())
            self._source = self._origins.blamed(results, lost=self._lost)
            return
        self._grads = {name: g.to_dense().double() / self._scale for name, g in grads.items()}
        self._error = difference_of(self._grads, self._survey.gradients)

    def judged(self, moved: tuple[float, float]) -> Trial:
        """Returns what came of the step.

        Args:
            moved: By how much rounding alone moves loss and gradients.
        """
        if self._bad:
            what = "the loss" if self._lost else "a gradient"
            begun = f": it begins {described(self._source)}" if self._source is not None else ""
            wrong = f"{what} is not finite{begun}"
        else:
            wrong = self._difference(moved) or self._flushed(self._grads) or self._crowded
        return Trial(
            self._dtype,
            self._scale,
            loss=self._loss,
            gradient_error=self._error,
            wrong=wrong,
            overflowed_back=self._bad and not self._lost,
            narrow=frozenset(self._narrow),
        )

    def _difference(self, moved: tuple[float, float]) -> str:
        """Returns what differs too much from float32, and by how much; empty if nothing does."""
        survey, loss, error = self._survey, self._loss, self._error
        of_loss, of_gradients = survey.spread or (0.0, 0.0)
        most_loss, most_gradients = _BOUNDS[self._dtype]
        rounding = 2 * torch.finfo(self._dtype).eps * survey.rounding
        bound = max(most_loss * abs(survey.loss), rounding, 2 * of_loss, 2 * moved[0])
        if abs(loss - survey.loss) > bound:
            return f"the loss is {loss:.6g}, and {survey.loss:.6g} in float32"
        if error is not None and error > max(most_gradients, 2 * of_gradients, 2 * moved[1]):
            return f"the gradients differ from those in float32 by {error:.0%} of their norm"
        return ""

    def _flushed(self, grads: dict[str, Tensor]) -> str:
        """Returns how much of a gradient became 0, if that is too much and nothing is random."""
        if self._survey.spread is not None:
            return ""
        for name, expected in self._survey.gradients.items():
            there = expected != 0
            count = int(there.sum())
            lost = int((there & (grads[name] == 0)).sum()) if name in grads else count
            if count and lost > _FLUSHED * count:
                return f"{lost / count:.0%} of the gradient of {name} became 0"
        return ""


def _ignored(*what: Any) -> None:
    """Looks at nothing."""


def _largest(values: Tensor) -> float:
    """Returns the largest finite magnitude, but for one number far below 0, as masks have it."""
    values = values[values.isfinite()].float()
    low = values[values <= -_CROWDED]
    if low.numel() and bool((low == low[0]).all()):
        values = values[values > -_CROWDED]
    return float(values.abs().amax()) if values.numel() else 0.0
