"""What the backward passes of a step had in 16 bits, before their gradients were added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpcore.backends import Inspection
from mpcore.engine import Look, MixedPrecisionOptimizer, StepGradients
from mpcore.monitoring.findings import Columns, Finding


@dataclass
class _Total:
    """Counts of several passes that had the same gradients at the same loss scale."""

    look: Look
    scale: Tensor
    passes: int = 1

    def add(self, look: Look) -> None:
        """Adds those of another pass; no host sync."""
        found = added(self.look.found, look.found)
        self.look = Look(look.params, look.shapes, look.layouts, found)
        self.passes += 1


def added(old: Inspection, new: Inspection) -> Inspection:
    """Returns what two looks with statistics have found together; no host sync."""
    return replace(
        old,
        kinds=old.kinds | new.kinds,
        first_bad=torch.where(old.first_bad < 0, new.first_bad, old.first_bad),
        square_sum=old.square_sum + new.square_sum,
        largest=_both(torch.maximum, old.largest, new.largest),
        counts=_both(torch.add, old.counts, new.counts),
        histogram=_both(torch.add, old.histogram, new.histogram),
    )


def _both(
    join: Callable[[Tensor, Tensor], Tensor], old: Tensor | None, new: Tensor | None
) -> Tensor | None:
    return None if old is None or new is None else join(old, new)


class PassCounts:
    """Counts of the passes of one step; nothing but `merged` syncs with the host.

    Example:
        >>> counts = PassCounts()
        >>> counts.merged([], lambda param: "p")
        []
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[object, ...], _Total] = {}

    def __bool__(self) -> bool:
        return bool(self._totals)

    def add(self, looks: Sequence[Look], scale: Tensor, loss: str) -> None:
        """Adds what was found in a pass.

        Args:
            looks: With statistics, one for each device.
            scale: 0-d, what its loss was multiplied by.
            loss: The name of that.
        """
        for look in looks:
            key = (loss, look.layouts, *map(id, look.params))
            if key in self._totals:
                self._totals[key].add(look)
            else:
                self._totals[key] = _Total(look, scale.clone())

    def see(
        self,
        optimizer: MixedPrecisionOptimizer,
        params: Sequence[Tensor],
        scale: Tensor,
        loss: str,
    ) -> None:
        """Looks at the gradients of a pass before they are added up.

        Args:
            optimizer: Whose they are.
            params: That have one.
            scale: As for `add`.
            loss: Likewise.
        """
        gradients = StepGradients(
            params,
            optimizer._masters,
            optimizer._stage._backend,
            scale.reciprocal(),
            statistics=True,
        )
        gradients.inspect()
        self.add(gradients.findings.looks(), scale, loss)

    def merged(
        self, findings: Sequence[tuple[Tensor, Finding]], name_of: Callable[[Tensor], str]
    ) -> list[Finding]:
        """Returns findings of sums with what the passes had in 16 bits; syncs.

        Args:
            findings: By parameter, of the sums: their norms stay, and what was not finite.
            name_of: Names a parameter.
        """
        found: dict[int, list[tuple[Finding, int]]] = {}
        for total in self._totals.values():
            names = list(map(name_of, total.look.params))
            columns = Columns(names, total.look, float(total.scale), sums=False)
            for place, param in enumerate(total.look.params):
                found.setdefault(id(param), []).append((columns.finding(place), total.passes))
        return [_merged(one, found.get(id(param), [])) for param, one in findings]


def _merged(sums: Finding, passes: Sequence[tuple[Finding, int]]) -> Finding:
    """Returns what was found in a sum, with the counts of the passes that made it."""
    if not passes or any(one.histogram is None for one, _ in passes):
        return sums
    count = sum(number for _, number in passes)
    kinds = sums.kinds or next((one.kinds for one, _ in passes if one.kinds), ())
    rooms = [one.headroom_bits for one, _ in passes if one.headroom_bits is not None]
    largest = [one.largest for one, _ in passes if one.largest is not None]
    bins = zip(*(one.histogram or () for one, _ in passes), strict=True)
    return replace(
        sums,
        dtype=passes[0][0].dtype,
        kinds=kinds,
        largest=max(largest, default=None),
        headroom_bits=None if kinds else min(rooms, default=None),  # as of a single pass
        zeros=_mean([(one.zeros, number) for one, number in passes]),
        subnormal=_mean([(one.subnormal, number) for one, number in passes]),
        histogram=tuple(map(sum, bins)),
        passes=count,
    )


def _mean(shares: Sequence[tuple[float | None, int]]) -> float | None:
    if any(share is None for share, _ in shares):
        return None
    return sum((share or 0.0) * number for share, number in shares) / sum(n for _, n in shares)
