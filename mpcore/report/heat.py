"""Heat maps of parameters over steps: how much room gradients have, and which lose digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mpcore.monitoring.findings import Finding
from mpcore.monitoring.reading import Reading
from mpcore.report.page import Cell, HeatMap

_COLUMNS, _ROWS = 20, 40
_BAD = "#1c2430"
_UNKNOWN = "#f0f2f5"
_NOTHING = Cell(_UNKNOWN, "", "no reading")
# red deserves a look
_ROOM = ((1, "#b2182b"), (3, "#ef8a62"), (6, "#fddbc7"), (10, "#d1e5f0"), (math.inf, "#67a9cf"))
_SHARES = (
    *((0.001, "#f7fbff"), (0.01, "#deebf7"), (0.05, "#c6dbef")),
    *((0.2, "#9ecae1"), (0.5, "#fdae6b"), (1.01, "#d94801")),
)


def room_map(readings: Sequence[Reading]) -> HeatMap:
    """Returns how many doublings of the scale each layer had before it overflowed."""
    return _map(
        readings,
        _room,
        (*_room_legend(), (Cell(_BAD, "x", ""), "not finite: the step was skipped")),
        "Room before a gradient overflows, in doublings of the loss scale. Of the layers that turn "
        "red first, one will end the next growth of the scale.",
    )


def digits_map(readings: Sequence[Reading]) -> HeatMap:
    """Returns which share of the gradients of each layer was subnormal."""
    texts = ("below 0.1 %", "to 1 %", "to 5 %", "to 20 %", "to 50 %", "more")
    legend = [
        (Cell(colour, "", ""), text) for (_, colour), text in zip(_SHARES, texts, strict=True)
    ]
    return _map(
        readings,
        _subnormal,
        tuple(legend),
        "Share of the gradient values that are subnormal, where digits are lost. If layers turn "
        "orange, the loss scale is too low for them.",
    )


def activations_map(readings: Sequence[Reading]) -> HeatMap:
    """Returns how many doublings what each module returns has before it overflows."""
    return _map(
        [reading for reading in readings if reading.activations],
        _room,
        (*_room_legend(), (Cell(_BAD, "x", ""), "not finite")),
        "Room before what a module returns overflows in its format, in doublings. No loss scale is "
        "in it: a module that turns red needs smaller values, FP32 (keep_fp32) or bfloat16.",
        lambda reading: reading.activations,
    )


def _room_legend() -> list[tuple[Cell, str]]:
    texts = ("less than 1 doubling", "1 to 3", "3 to 6", "6 to 10", "10 or more")
    return [(Cell(colour, "", ""), text) for (_, colour), text in zip(_ROOM, texts, strict=True)]


def _map(
    readings: Sequence[Reading],
    cell_of: Callable[[Sequence[Finding]], Cell],
    legend: tuple[tuple[Cell, str], ...],
    caption: str,
    findings_of: Callable[[Reading], Sequence[Finding]] = lambda reading: reading.findings,
) -> HeatMap:
    shown = _spread(readings, _COLUMNS)
    names = list(dict.fromkeys(f.name for reading in shown for f in findings_of(reading)))
    group_of = grouped(names, _ROWS)
    by_step = []
    for reading in shown:
        groups: dict[str, list[Finding]] = {}
        for finding in findings_of(reading):
            groups.setdefault(group_of[finding.name], []).append(finding)
        by_step.append(groups)
    rows = tuple(
        (
            group,
            tuple(
                _at(reading, cell_of(groups[group])) if group in groups else _NOTHING
                for reading, groups in zip(shown, by_step, strict=True)
            ),
        )
        for group in dict.fromkeys(group_of.values())
    )
    columns = tuple(f"{r.step:,}" if i % 5 == 0 else "" for i, r in enumerate(shown))
    return HeatMap(columns, rows, legend, caption)


def _at(reading: Reading, cell: Cell) -> Cell:
    return Cell(cell.colour, cell.shown, f"step {reading.step}: {cell.told}")


def _room(findings: Sequence[Finding]) -> Cell:
    if any(not finding.finite for finding in findings):
        kinds = sorted({kind for finding in findings for kind in finding.kinds})
        return Cell(_BAD, "x", ", ".join(kinds))
    rooms = [f.headroom_bits for f in findings if f.headroom_bits is not None]
    if not rooms:
        return Cell(_UNKNOWN, "", "nothing but zeros, or not looked at")
    room = min(rooms)
    colour = next(c for limit, c in _ROOM if room < limit)
    return Cell(colour, "", f"{room:.1f} doublings")


def _subnormal(findings: Sequence[Finding]) -> Cell:
    shares = [finding.subnormal for finding in findings if finding.subnormal is not None]
    if not shares:
        return Cell(_UNKNOWN, "", "not looked at")
    colour = next(c for limit, c in _SHARES if max(shares) < limit)
    return Cell(colour, "", f"{max(shares):.1%} subnormal")


def _spread(readings: Sequence[Reading], count: int) -> list[Reading]:
    """Returns at most `count` readings, evenly spread, the first and the last among them."""
    if len(readings) <= count:
        return list(readings)
    places = {round(i * (len(readings) - 1) / (count - 1)) for i in range(count)}
    return [readings[place] for place in sorted(places)]


def grouped(names: Sequence[str], limit: int) -> dict[str, str]:
    """Returns a group for each name, so that there are at most `limit`: modules, or runs of names.

    Example:
        >>> grouped(["a.weight", "a.bias", "b.weight"], limit=2)
        {'a.weight': 'a', 'a.bias': 'a', 'b.weight': 'b'}
        >>> grouped(["p0", "p1", "p2"], limit=2)
        {'p0': 'p0 to p1', 'p1': 'p0 to p1', 'p2': 'p2'}
    """
    deepest = max((name.count(".") for name in names), default=0) + 1
    for depth in range(deepest, 0, -1):
        groups = {name: ".".join(name.split(".")[:depth]) for name in names}
        if len(set(groups.values())) <= limit:
            return groups
    size = -(-len(names) // limit)
    runs = [names[i : i + size] for i in range(0, len(names), size)]
    return {
        name: run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs for name in run
    }
