"""Readings of several ranks as one: counts are added up, what several ranks hold counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from mpcore.base import held_here
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.errors import ArgumentError
from mpcore.monitoring.findings import KINDS, Finding
from mpcore.monitoring.reading import Reading, summed_up


class Part(NamedTuple):
    """What a rank has found in what it holds of a gradient.

    Attributes:
        finding: That.
        values: How many elements it holds, as often as passes were counted.
        counts: Whether no rank before it holds the same ones.
        mesh: The ranks that hold pieces of a DTensor; empty of other parameters.
    """

    finding: Finding
    values: int
    counts: bool
    mesh: tuple[int, ...] = ()


def check_agrees(optimizer: MixedPrecisionOptimizer) -> None:
    """Raises unless there are ranks that an optimizer agrees with: their monitors answer."""
    if not optimizer._stage.ranks.agree:
        raise ArgumentError(
            "over_ranks: expected an optimizer that agrees with other ranks, got one that decides "
            "alone. Make it with ranks=mpcore.Ranks(), or of DTensors; or leave over_ranks out."
        )


def of_all_ranks(
    reading: Reading, optimizer: MixedPrecisionOptimizer, parameters: Sequence[tuple[str, Tensor]]
) -> Reading:
    """Returns the reading of all ranks together, on each; collective, syncs.

    Args:
        reading: Of this rank.
        optimizer: Whose ranks they are.
        parameters: Names and parameters of the optimizer.

    Raises:
        RankError: A rank did not answer: each needs a monitor that reads at the same steps.
    """
    ranks, by_name = optimizer._stage.ranks, dict(parameters)
    counts = ranks.counting()
    parts = [
        Part(
            finding,
            values=held_here(param.detach()).numel() * finding.passes,
            counts=counts(param),
            mesh=_mesh_of(param),
        )
        for finding in reading.findings
        if (param := by_name.get(finding.name)) is not None
    ]
    told = ranks.exchange(
        (parts, reading.loss, reading.largest_loss),
        "readings of monitors",
        "The step was made. Every rank needs a Monitor with over_ranks=True and the same `every`.",
    )
    findings = joined_findings(parts for parts, _, _ in told)
    losses = [loss for _, loss, _ in told if loss is not None]
    largest = [loss for _, _, loss in told if loss is not None]
    known = [finding.norm for finding in findings]
    return replace(
        reading,
        findings=findings,
        loss=math.fsum(losses) / len(losses) if losses else None,
        largest_loss=_largest(largest),
        grad_norm=_norm(known),
        rank=None,
        ranks=len(told),
        **summed_up(findings),
    )


def joined_findings(of_ranks: Iterable[Sequence[Part]]) -> tuple[Finding, ...]:
    """Returns a finding for each gradient, in the order in which ranks have them.

    Stages and experts may have different parameters of one name: then it says whose they are.

    Example:
        >>> one = Finding("w", (4,), "float16", (), None, 3.0, 2.0, 1.0, zeros=0.5)
        >>> other = Finding("w", (4,), "float16", ("NaN",), (0,), 4.0, 4.0, 0.0, zeros=0.0)
        >>> pieces = [[Part(one, 2, True, (0, 1))], [Part(other, 2, True, (0, 1))]]
        >>> (found,) = joined_findings(pieces)
        >>> found.norm, found.largest, found.headroom_bits, found.zeros, found.kinds
        (5.0, 4.0, 0.0, 0.25, ('NaN',))
        >>> stages = [[Part(one, 4, True)], [Part(other, 4, True)]]
        >>> [finding.name for finding in joined_findings(stages)]
        ['w (rank 0)', 'w (rank 1)']
    """
    by_name: dict[str, list[tuple[int, Part]]] = {}
    places: dict[tuple[int, str], int] = {}
    for rank, parts in enumerate(of_ranks):
        for place, part in enumerate(parts):
            places[rank, part.finding.name] = place
            by_name.setdefault(part.finding.name, []).append((rank, part))
    found = []
    for name, told in by_name.items():
        groups = _of_one_parameter(told)
        for rank, some in groups:
            shown = name if len(groups) == 1 else f"{name} (rank {rank})"
            found.append((rank, places[rank, name], _joined(some, shown)))
    return tuple(finding for *_, finding in sorted(found, key=itemgetter(0, 1)))


def _of_one_parameter(told: Sequence[tuple[int, Part]]) -> list[tuple[int, list[Part]]]:
    """Returns what belongs together of what ranks have told of a name, and the first such rank."""
    counted = [part for _, part in told if part.counts]
    values = sum(part.values // part.finding.passes for part in counted)
    if len(counted) < 2 or values == math.prod(counted[0].finding.shape):
        return [(told[0][0], [part for _, part in told])]
    groups: dict[Any, tuple[int, list[Part]]] = {}
    for rank, part in told:
        if part.mesh or part.counts:  # else a copy of what another rank counts
            groups.setdefault(part.mesh or rank, (rank, []))[1].append(part)
    return list(groups.values())


def _joined(parts: Sequence[Part], name: str) -> Finding:
    # who counts a gradient may have none in this step
    counted = [part for part in parts if part.counts] or parts[:1]
    kinds = {kind for part in parts for kind in part.finding.kinds}
    first = parts[0].finding
    histograms = [p.finding.histogram for p in counted if p.finding.histogram is not None]
    largest = [p.finding.largest for p in parts if p.finding.largest is not None]
    rooms = [p.finding.headroom_bits for p in parts if p.finding.headroom_bits is not None]
    return replace(
        first,
        name=name,
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        # an index in a piece says nothing of the whole
        first_bad=first.first_bad if len(counted) == 1 and counted[0] is parts[0] else None,
        norm=_norm([part.finding.norm for part in counted]),
        largest=_largest(largest),
        headroom_bits=min(rooms, default=None),
        zeros=_share(counted, lambda finding: finding.zeros),
        subnormal=_share(counted, lambda finding: finding.subnormal),
        histogram=tuple(map(sum, zip(*histograms, strict=True))) if histograms else None,
        passes=max(part.finding.passes for part in parts),
    )


def _share(parts: Sequence[Part], share_of: Callable[[Finding], float | None]) -> float | None:
    known: list[Any] = [(share_of(p.finding), p.values) for p in parts]
    known = [(share, values) for share, values in known if share is not None]
    total = sum(values for _, values in known)
    if not known:
        return None
    return sum(share * values for share, values in known) / total if total else 0.0


def _norm(norms: Sequence[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms)) if norms else math.nan


def _largest(values: Sequence[float]) -> float | None:
    # what is NaN is larger than anything, and not lost behind numbers
    return math.nan if any(map(math.isnan, values)) else max(values, default=None)


def _mesh_of(param: Any) -> tuple[int, ...]:
    """Returns the ranks of a DTensor's mesh; none of others."""
    mesh = getattr(param, "device_mesh", None)
    return () if mesh is None else tuple(mesh.mesh.flatten().tolist())
