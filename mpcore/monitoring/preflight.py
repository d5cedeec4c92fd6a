"""`preflight`: one float32 step that tells what 16 bits would do to a model, and one that tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.errors import ArgumentError
from mpcore.monitoring.advice import TOO_MANY, Choice, after_trial, percent, recommended, short
from mpcore.monitoring.ranges import Range
from mpcore.monitoring.survey import Survey, survey_of
from mpcore.monitoring.trial import Trial, try_out

_SHOWN = 8
_SLIGHT = 3  # rank of a problem that is none of the graver kinds


@dataclass(frozen=True)
class Preflight:
    """What a step in float32 says about 16 bits. `str(preflight)` is for people, and is short.

    Attributes:
        ranges: The batch, weights, buffers, activations, the loss and gradients, in the order in
            which they appeared; of operations between modules those that float16 could harm.
        dtype: The format to use: float16, bfloat16, or float32 if neither of them holds all. It is
            chosen by what would overflow, and by the gradients that would be lost if they are more
            than 1 % of all. `problems` has those as well that do not matter as much.
        loss_scale: The scale to start from; 1 for bfloat16 and float32.
        reason: Why.
        trials: The steps that were run in 16 bits, the last one in `dtype` unless that is float32.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> found = preflight(model, torch.full((1, 2), 1e5), lambda out: out.sum())
        >>> found.dtype, [one.kind for one in found.problems(torch.float16)]
        (torch.bfloat16, ['input', 'activation', 'loss', 'weight gradient'])
    """

    ranges: tuple[Range, ...]
    dtype: torch.dtype
    loss_scale: float
    reason: str
    trials: tuple[Trial, ...] = ()

    def problems(self, dtype: torch.dtype, loss_scale: float = 1.0) -> list[Range]:
        """Returns everything of which a format would overflow or flush to 0 any share at all.

        What stays in float32 in a model that was cast (see `Range.wide`) is none of it.

        First comes what is infinite in float32 already, then what overflows, then what loses more
        than 1 %, then the rest; among equals those that appeared first.

        Args:
            dtype: float16 or bfloat16.
            loss_scale: Multiplies gradients.

        Raises:
            ArgumentError: It is another format.
        """
        found = []
        for one in self.ranges:
            scale = one.scaled_by(loss_scale)
            harmed = one.overflows(dtype, scale) or one.flushes(dtype, scale)
            if one.infinite or (harmed and not one.wide):
                found.append(one)
        return sorted(found, key=lambda one: _rank(one, dtype, loss_scale))

    def __str__(self) -> str:
        scale = f", loss scale {self.loss_scale:g}" if self.loss_scale != 1 else ""
        lines = [f"Use {short(self.dtype)}{scale}: {self.reason}"]
        last = {trial.dtype: trial for trial in self.trials}  # of each format
        lines += [f"  {trial}" for trial in last.values()]
        formats = dict.fromkeys([(torch.float16, 1.0), (torch.bfloat16, 1.0)])
        if self.dtype != torch.float32:
            formats[self.dtype, self.loss_scale] = None
        for dtype, used in formats:
            lines += self._listed(dtype, used)
        return "\n".join(lines)

    def _listed(self, dtype: torch.dtype, loss_scale: float) -> list[str]:
        problems = self.problems(dtype, loss_scale)
        grave = sum(_rank(one, dtype, loss_scale) < _SLIGHT for one in problems)
        name = short(dtype)
        lines = [f"  {name} with a loss scale of {loss_scale:g}: {len(problems)} problems"]
        if problems:
            lines[0] += f", {grave} of them infinite, too large or more than 1 % lost"
        lines += [
            f"    {p.kind} {p.name or '(the model)'}: {p.smallest:.3g} to {p.largest:.3g}, "
            f"{_shares(p, dtype, loss_scale)}"
            for p in problems[:_SHOWN]
        ]
        if len(problems) > _SHOWN:
            more = len(problems) - _SHOWN
            lines.append(f"    and {more} more: see problems(torch.{name}, {loss_scale:g})")
        return lines


def _rank(one: Range, dtype: torch.dtype, loss_scale: float) -> int:
    scale = one.scaled_by(loss_scale)
    if one.infinite:
        return 0
    if one.overflows(dtype, scale):
        return 1
    return 2 if one.flushed(dtype, scale) > TOO_MANY else _SLIGHT


def _shares(one: Range, dtype: torch.dtype, loss_scale: float) -> str:
    scale = one.scaled_by(loss_scale)
    # weights are never made infinite: cast_model refuses them, and a step clamps them
    too_large = "too large" if one.kind == "weight" else "infinite"
    text = (
        f"{percent(one.overflowing(dtype, scale))} {too_large}, "
        f"{percent(one.flushed(dtype, scale))} lost"
    )
    return f"{one.infinite} values infinite in float32, {text}" if one.infinite else text


def preflight(model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> Preflight:
    """Runs a step in float32 and one in the format that it recommends; syncs many times.

    The first is looked at operation by operation, forward and back: see `Preflight.ranges`. The
    second is that of a model which `cast_model` has cast: its loss and gradients are compared with
    those in float32, its operations have to have two bits of room in float16, and if something is
    wrong with it, the next format is tried. What both leave is "float32".

    Model and batch stay as they were: weights, gradients, buffers, hooks, attributes, random
    numbers. Nothing is stepped.

    Args:
        model: In float32.
        batch: A tensor, a tuple of positional or a dictionary of keyword arguments.
        loss_of: Returns the loss from the model's output, in 16 bits as well.

    Raises:
        ArgumentError: A parameter is not float32, or a weight, the loss or a gradient is NaN.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 2)
        >>> found = preflight(model, torch.ones(8, 4), lambda out: out.square().mean())
        >>> found.dtype, found.loss_scale > 1, found.trials[0].wrong
        (torch.float16, True, '')
    """
    other = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if other:
        raise ArgumentError(
            f"model: expected float32 parameters, got others: {other[0]}. Run it before casting."
        )
    survey = survey_of(model, batch, loss_of)

    def run(choice: Choice) -> Trial:
        return try_out(
            model, batch, loss_of, survey=survey, dtype=choice.dtype, loss_scale=choice.loss_scale
        )

    choice, trials = _chosen(survey, run)
    ranges = tuple(replace(one, wide=_is_wide(one, trials)) for one in survey.ranges)
    return Preflight(ranges, choice.dtype, choice.loss_scale, choice.reason, tuple(trials))


def _chosen(survey: Survey, run: Callable[[Choice], Trial]) -> tuple[Choice, list[Trial]]:
    """Returns the first choice that works, and what was tried."""
    trials: list[Trial] = []
    choice = recommended(survey.ranges, tried=True)
    while choice.dtype != torch.float32:
        trial = run(choice)
        trials.append(trial)
        following = after_trial(choice, trial, survey.ranges)
        if following == choice or trial.untried:
            return following, trials
        choice = following
    return choice, trials


def _is_wide(one: Range, trials: list[Trial]) -> bool:
    """Returns whether it was in float32 in a step that ran, and not in 16 bits in any."""
    if all(trial.loss is None for trial in trials):
        return False
    narrow = {name for trial in trials for name in trial.narrow}
    if one.kind in ("buffer", "loss"):
        return f"{one.kind} {one.name}".rstrip() not in narrow
    return (one.kind == "input" or one.between) and one.name not in narrow
