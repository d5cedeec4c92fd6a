"""What a step in float32 has: the sizes of everything, the loss, the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.errors import ArgumentError
from mpcore.monitoring.nests import tensors_in
from mpcore.monitoring.operations import Operation, Place, values_of
from mpcore.monitoring.origins import Event, Origins, is_finite, kinds_of
from mpcore.monitoring.probe import Probe
from mpcore.monitoring.ranges import Range, range_of

_LARGE = torch.finfo(torch.float16).max / 4
_SMALL = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps


@dataclass(frozen=True)
class Survey:
    """A step in float32.

    Attributes:
        ranges: Of everything, in the order in which it appeared.
        loss: Of the batch.
        gradients: Of the weights, by name.
        rounding: By how much the loss moves, at most and to first order, if each number of the
            model's output moves by its own size.
        spread: By how much loss and gradients (as `difference_of` has it) move with other random
            numbers; None if none were drawn.
        source: What made the loss or a gradient not finite first; None if they are finite.
    """

    ranges: tuple[Range, ...]
    loss: float
    gradients: dict[str, Tensor]
    rounding: float
    spread: tuple[float, float] | None
    source: Event | None


def survey_of(model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> Survey:
    """Runs a step in float32 and looks at everything; syncs many times.

    Raises:
        ArgumentError: The loss, a gradient or a weight is NaN.

    Example:
        >>> survey = survey_of(nn.Linear(1, 1), torch.ones(1, 1), lambda out: (out * 0 + 2).sum())
        >>> survey.loss, [one.kind for one in survey.ranges][:3]
        (2.0, ['input', 'weight', 'weight'])
    """
    survey = _Look(model, batch, loss_of).survey()
    return survey if survey.spread is None else _with_spread(survey, model, batch, loss_of)


def _with_spread(
    survey: Survey, model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]
) -> Survey:
    """Returns the survey with what other random numbers change, seen in a second run."""
    found: list[tuple[float, float]] = []

    def judge(loss: Tensor) -> None:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        error = difference_of(grads, survey.gradients)
        found.append((abs(float(loss) - survey.loss), error or 0.0))

    devices = {param.device for param in model.parameters() if param.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(torch.initial_seed() + 1)
        Probe(model, batch, loss_of).run(lambda *_: None, lambda _: None, after=judge)
    return replace(survey, spread=found[0])


def difference_of(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float | None:
    """Returns the norm of the difference as a share of the norm of `expected`, None if that is 0.

    Example:
        >>> difference_of({"w": torch.tensor([1.5])}, {"w": torch.tensor([1.0])})
        0.5
    """
    squares = difference = 0.0
    for name, value in expected.items():
        wide = value.double()
        squares += float(wide.square().sum())
        other = grads.get(name)
        off = wide if other is None else wide - other.to_dense().double()
        difference += float(off.square().sum())
    return math.sqrt(difference / squares) if squares else None


def name_of(operation: Operation) -> str:
    """Returns how an operation is called in a list of ranges; the same wherever it runs again."""
    place = operation.place
    line = "" if place.line is None else f" ({place.line.file}:{place.line.number})"
    name = "cast" if operation.name.startswith("cast to ") else operation.name
    return f"{place.module or '(the model)'}, {name}{line}"


class _Look:
    """Collects what a survey has."""

    def __init__(self, model: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor]) -> None:
        self._model = model
        self._probe = Probe(model, batch, loss_of)
        self._loss_of = loss_of
        # a leaf of torch's own has no operations between modules
        self._leaves = {
            name
            for name, module in model.named_modules()
            if not any(module.children()) and type(module).__module__.startswith("torch.nn.")
        }
        self._ranges: list[tuple[Range, bool]] = []  # and whether -inf alone is in it
        self._places: dict[str, int] = {}  # of the ranges of operations
        self._outputs: list[Tensor] = []
        self._rounding = 0.0
        self._random = False
        self._origins = Origins(self._probe.named())

    def survey(self) -> Survey:
        given = [(name, t) for name, t in tensors_in(self._probe.batch, "batch")]
        for name, tensor in given:
            if tensor.is_floating_point():
                self._add(range_of("input", name, [tensor], masks=True))
        for name, param in self._model.named_parameters():
            if "NaN" in kinds_of([param]):
                raise _nan(f"weight {name}", None)
            self._add(range_of("weight", name, [param]))
        for name, buffer in self._model.named_buffers():
            if buffer.is_floating_point():
                self._add(range_of("buffer", name, [buffer], masks=True))
        self._probe.run(self._visit, self._see, after=self._judge)
        return self._made

    def _add(self, one: Range, *, negative: bool = False) -> None:
        self._ranges.append((one, negative))

    def _see(self, operation: Operation) -> None:
        self._random = self._random or operation.random
        self._origins.see(operation)
        place = operation.place
        if place.phase != "forward" or place.module in self._leaves:
            return
        outputs = [] if operation.is_view else [*map(values_of, operation.outputs)]
        real = [t for t in outputs if t is not None and t.is_floating_point()]
        if not any(map(_is_extreme, real)):
            return
        name = name_of(operation)
        one = replace(range_of("activation", name, real, masks=True), between=True)
        at = self._places.setdefault(name, len(self._ranges))
        if at == len(self._ranges):
            self._add(one)
        elif one.largest > self._ranges[at][0].largest:
            self._ranges[at] = one, False  # the same line again, in a loop for example

    def _visit(
        self, phase: str, name: str, what: Any, into: list[Tensor], out: list[Tensor]
    ) -> None:
        if phase == "forward":
            negative = "inf" not in kinds_of(out)
            self._add(range_of("activation", name, out), negative=negative)
        elif phase == "loss":
            self._outputs = into
            self._add(range_of("loss", "", out))
        elif phase == "backward" and what is self._loss_of:  # whose gradient is always float32
            self._rounding = _moved_by(self._outputs, out)
        elif phase == "backward":
            self._add(range_of("gradient", name, into))

    def _judge(self, loss: Tensor) -> None:
        grads = {
            name: param.grad
            for name, param in self._model.named_parameters()
            if param.grad is not None
        }
        for name, grad in grads.items():
            self._add(range_of("weight gradient", name, [grad]))
        lost = not is_finite(loss)
        results = [loss] if lost else list(grads.values())
        source = self._origins.blamed(results, lost=lost)
        if "NaN" in kinds_of([loss, *grads.values()]):
            raise _nan("the loss" if "NaN" in kinds_of([loss]) else "a gradient", source)
        self._made = Survey(
            ranges=tuple(self._known(lost=lost, harmed=not all(map(is_finite, results)))),
            loss=float(loss),
            gradients={name: _dense(grad) for name, grad in grads.items()},
            rounding=self._rounding,
            spread=(0.0, 0.0) if self._random else None,
            source=source,
        )

    def _known(self, *, lost: bool, harmed: bool) -> Iterator[Range]:
        """Yields the ranges without infinities that do no harm."""
        for one, negative in self._ranges:
            of_itself = one.between or one.kind in ("input", "buffer")
            harmless = (negative and not lost) or (of_itself and not harmed)
            yield replace(one, infinite=0) if harmless else one


def _moved_by(outputs: list[Tensor], grads: list[Tensor]) -> float:
    """Returns the sum of the magnitudes of all values times their gradients."""
    left, total = list(outputs), 0.0
    for grad in grads:  # of some of the outputs, in order
        at = next((i for i, value in enumerate(left) if value.shape == grad.shape), None)
        if at is not None:
            value = left.pop(at)
            total += float((value.double() * grad.double()).abs().sum())
    return total


def _is_extreme(values: Tensor) -> bool:
    """Returns whether float16 could overflow or flush something."""
    sizes = values.abs()
    return bool((sizes > _LARGE).any() | ((sizes > 0) & (sizes < _SMALL)).any())


def _dense(grad: Tensor) -> Tensor:
    grad = grad.detach().to_dense() if grad.layout != torch.strided else grad.detach()
    return grad.clone()


def _nan(what: str, source: Event | None) -> ArgumentError:
    begun = f" It begins {described(source)}." if source is not None else ""
    return ArgumentError(
        f"model: expected values without NaN in float32, got some: {what}.{begun} "
        "mpcore.trace_overflow(...) shows the way there."
    )


def described(event: Event) -> str:
    """Returns where something began, for a sentence."""
    place: Place = event.place
    named = next(filter(None, (event.cast_of, *event.outside)), "")
    text = f"in {event.name} in the {place.phase} pass of {place.module or '(the model)'}"
    text += f", given {named}" if named else ""
    return text if place.line is None else f"{text}, {place.line.file}:{place.line.number}"
