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
from mpcore.monitoring.origins import Origins, is_finite
from mpcore.monitoring.probe import Probe
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
            cast_model(model, dtype)
            # of a batch that becomes infinite it is the result that tells
            warnings.filterwarnings("ignore", "cast_model: the batch holds", UserWarning)
            return _Attempt(model, batch, loss_of, survey, dtype, loss_scale).trial
        except (ArgumentError, StageError, RuntimeError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if isinstance(error, StageError) or _UNTRIED in str(error):
                return Trial(dtype, loss_scale, untried=text)
            return Trial(dtype, loss_scale, wrong=f"a step raises {text}")


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
            # what is large and negative is a mask's, and what is infinite is judged by what it does
            largest = max(float(tensor.amax()) for tensor in outputs)
            if largest > _CROWDED:
                self._crowded = f"{name} reaches {largest:.3g}, and float16 ends at 65504"
        if operation.name.startswith("cast"):
            self._narrow |= {self._origins.name_of(given) for given, _ in operation.inputs}

    def _judge(self, loss: Tensor) -> None:
        grads = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        lost = not is_finite(loss)
        bad = lost or not all(map(is_finite, grads.values()))
        results = [loss] if lost else list(grads.values())
        source = self._origins.blamed(results, lost=lost) if bad else None
        grads = (
            {} if bad else {name: g.to_dense().double() / self._scale for name, g in grads.items()}
        )
        error = None if bad else difference_of(grads, self._survey.gradients)
        self._narrow |= {"loss"} if loss.dtype == self._dtype else set()
        if bad:
            what = "the loss" if lost else "a gradient"
            begun = f": it begins {described(source)}" if source is not None else ""
            wrong = f"{what} is not finite{begun}"
        else:
            wrong = self._difference(float(loss), error) or self._flushed(grads) or self._crowded
        self.trial = Trial(
            self._dtype,
            self._scale,
            loss=float(loss),
            gradient_error=error,
            wrong=wrong,
            overflowed_back=bad and not lost,
            narrow=frozenset(self._narrow),
        )

    def _difference(self, loss: float, error: float | None) -> str:
        """Returns what differs too much from float32, and by how much; empty if nothing does."""
        survey = self._survey
        of_loss, of_gradients = survey.spread or (0.0, 0.0)
        most_loss, most_gradients = _BOUNDS[self._dtype]
        rounding = 2 * torch.finfo(self._dtype).eps * survey.rounding
        bound = max(most_loss * abs(survey.loss), rounding, 2 * of_loss)
        if abs(loss - survey.loss) > bound:
            return f"the loss is {loss:.6g}, and {survey.loss:.6g} in float32"
        if error is not None and error > max(most_gradients, 2 * of_gradients):
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
