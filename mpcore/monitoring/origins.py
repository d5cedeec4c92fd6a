"""Where numbers that are not finite came from, followed from operation to operation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mpcore.monitoring.operations import CONSTANT, Operation, Place, memory_of, values_of

_NAN, _ABOVE, _BELOW = "NaN", "inf", "-inf"


@dataclass(frozen=True)
class Event:
    """An operation whose result is not finite.

    Attributes:
        number: In the order of operations.
        name: Of the operation.
        place: Where.
        parents: Numbers of the events that its inputs come from, if they are not finite.
        outside: Names of inputs that are not finite and come from no operation: a weight, a buffer,
            the batch, or "" for others.
        cast_of: If it is a cast, the name of the weight, buffer or part of the batch that it casts.
        makes: Whether it made something that is not finite of finite numbers.
        mask: Whether it writes -inf as a constant, or hands it on, as masks have it.
        kinds_in: Which of NaN, inf and -inf were in the inputs.
        kinds: Which of them came out.
        finite_in: Whether all inputs were finite.
        largest_in: Largest finite magnitude of the inputs.
        largest_out: Of what came out.
    """

    number: int
    name: str
    place: Place
    parents: tuple[int, ...]
    outside: tuple[str, ...]
    cast_of: str
    makes: bool
    mask: bool
    kinds_in: frozenset[str]
    kinds: frozenset[str]
    finite_in: bool
    largest_in: float
    largest_out: float

    @property
    def back(self) -> bool:
        """Whether it belongs to the backward pass."""
        return self.place.phase == "backward"


class Origins:
    """Notes each operation whose result is not finite, and what its inputs came from; syncs.

    Args:
        named: Tensors that are there before, by name.

    Example:
        >>> origins = Origins([("weight w", torch.ones(1))])
        >>> origins.blamed([torch.ones(1)], lost=True) is None
        True
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._names = {
            memory_of(tensor): name for name, tensor in named if memory_of(tensor) is not None
        }
        self._events: dict[int, Event] = {}
        self._last: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0

    def see(self, operation: Operation) -> Event | None:
        """Notes an operation; returns it if its result is not finite."""
        self._count += 1
        if operation.is_view:  # not worth a word: what reads it is
            return None
        bad = [tensor for tensor in operation.outputs if not is_finite(tensor)]
        if not bad:
            if not operation.writes:  # a part of written memory may be bad still
                for tensor in operation.outputs:
                    self._last.pop(memory_of(tensor) or 0, None)
            return None
        event = self._event(operation, bad)
        self._events[event.number] = event
        for tensor in bad:
            key, values = memory_of(tensor), values_of(tensor)
            if key is not None and values is not None:
                reference = StorageWeakRef(values.untyped_storage())  # type: ignore[no-untyped-call]
                self._last[key] = (reference, event.number)
        return event

    def _event(self, operation: Operation, bad: Sequence[Tensor]) -> Event:
        read = [] if operation.name == CONSTANT else operation.inputs  # a constant's memory
        wrong = [(given, before) for given, before in read if not is_finite(before)]
        parents, outside = [], []
        for given, _ in wrong:
            number = self._number_of(given)
            if number is None:
                outside.append(self.name_of(given))
            else:
                parents.append(number)
        kinds = kinds_of(bad)
        kinds_in = kinds_of([before for _, before in wrong])
        makes = not wrong or (operation.pointwise and _makes(operation.inputs, bad))
        written = operation.name == CONSTANT or -math.inf in operation.constants
        of_weight = any(name.startswith("weight") for name in outside)
        of_masks = all(self._events[number].mask for number in parents)
        handed_on = kinds_in == {_BELOW} and not makes and not of_weight and of_masks
        return Event(
            number=self._count,
            name=operation.name,
            place=operation.place,
            parents=tuple(parents),
            outside=tuple(outside),
            cast_of=self._cast_of(operation),
            makes=makes,
            mask=kinds == {_BELOW} and (written or handed_on),
            kinds_in=kinds_in,
            kinds=kinds,
            finite_in=not wrong,
            largest_in=largest_of([before for _, before in read]),
            largest_out=largest_of(bad),
        )

    def _number_of(self, tensor: Tensor) -> int | None:
        reference, number = self._last.get(memory_of(tensor) or 0, (None, None))
        if reference is None or reference.expired():  # type: ignore[no-untyped-call]
            return None  # other memory that lies where something was before
        return number

    def name_of(self, tensor: Tensor) -> str:
        """Returns the name of a tensor that was there before, "" if it was not."""
        return self._names.get(memory_of(tensor) or 0, "")

    def _cast_of(self, operation: Operation) -> str:
        casts = operation.name.startswith("cast") or operation.name == "copy_"
        return self.name_of(operation.inputs[0][0]) if casts and operation.inputs else ""

    def blamed(self, results: Iterable[Tensor], *, lost: bool) -> Event | None:
        """Returns the event that made results not finite, None if none is known; syncs.

        The first that made it of finite numbers, or got a weight, a buffer or something unknown
        that is not finite; else the first that made something else of the -inf of masks.

        Args:
            results: The loss, or gradients.
            lost: Whether the loss is not finite. If it is, what the forward pass made was meant, or
                did no harm, and the backward pass alone counts.
        """
        ways = self._on_the_way(results, lost=lost)
        if not lost:
            return next(filter(self._begins, ways), None)
        open_ones = [event for event in ways if not event.mask]
        sources = (event for event in open_ones if event.makes or event.outside)
        turning = (event for event in open_ones if event.kinds - event.kinds_in)
        return next(sources, None) or next(turning, None) or next(iter(ways), None)

    def _on_the_way(self, results: Iterable[Tensor], *, lost: bool) -> list[Event]:
        """Returns all events that results came from, in order."""
        found: dict[int, Event] = {}
        numbers = [self._number_of(tensor) for tensor in results if not is_finite(tensor)]
        waiting = [number for number in numbers if number is not None]
        while waiting:
            event = self._events[waiting.pop()]
            if event.number not in found and (lost or event.back):
                found[event.number] = event
                waiting += event.parents
        return [found[number] for number in sorted(found)]

    def _begins(self, event: Event) -> bool:
        """Returns whether nothing in the backward pass before had made its inputs not finite."""
        return event.makes or not any(self._events[number].back for number in event.parents)


def _makes(inputs: Sequence[tuple[Tensor, Tensor]], outputs: Sequence[Tensor]) -> bool:
    """Returns whether a pointwise operation has a bad value where no input had one."""
    given = [before.detach() for _, before in inputs]
    if any(tensor.layout != torch.strided for tensor in (*given, *outputs)):
        return False
    for output in outputs:
        bad = ~torch.isfinite(output.detach())
        for tensor in given:
            try:
                bad = bad & torch.isfinite(tensor)
            except RuntimeError:  # of another shape, as those of several tensors at once are
                return False
        if bool(bad.any()):
            return True
    return False


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all values are finite, also where there are none; syncs.

    Example:
        >>> is_finite(torch.tensor([0, 1])), is_finite(torch.tensor([0.0, torch.nan]))
        (True, False)
    """
    values = values_of(tensor)
    return values is None or bool(torch.isfinite(values).all())


def kinds_of(tensors: Iterable[Tensor]) -> frozenset[str]:
    """Returns which of NaN, inf and -inf are in some tensors; syncs.

    Example:
        >>> sorted(kinds_of([torch.tensor([torch.nan]), torch.tensor([-torch.inf, 1.0])]))
        ['-inf', 'NaN']
    """
    found: set[str] = set()
    for tensor in tensors:
        values = values_of(tensor)
        if values is None:
            continue
        values = torch.view_as_real(values) if values.is_complex() else values
        tests = (
            (_NAN, values.isnan()),
            (_ABOVE, values == torch.inf),
            (_BELOW, values == -torch.inf),
        )
        found |= {kind for kind, test in tests if bool(test.any())}
    return frozenset(found)


def largest_of(tensors: Iterable[Tensor]) -> float:
    """Returns the largest finite magnitude, 0 if there is none; syncs.

    Example:
        >>> largest_of([torch.tensor([-3.0, torch.inf]), torch.ones(1)])
        3.0
    """
    largest = 0.0
    for tensor in tensors:
        values = values_of(tensor)
        if values is not None:
            sizes = values.abs().double()
            largest = max(largest, float(torch.where(torch.isfinite(sizes), sizes, 0.0).amax()))
    return largest
