"""How often verdicts are right; `PYTHONPATH=tests/support python -m mpcore_testing.verdict_table`

prints the table of docs/monitoring.md, what is wrong, and false alarms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mpcore_testing.odd_trainings import ODD
from mpcore_testing.verdict_cases import SETTINGS, Fault, Said, faults, said_of


class Measured(NamedTuple):
    """What was said of every training."""

    faulty: Sequence[tuple[Fault, Said]]
    healthy: Sequence[tuple[str, Said]]

    @property
    def wrong(self) -> list[tuple[Fault, Said]]:
        return [(fault, said) for fault, said in self.faulty if not fault.is_right(said)]

    @property
    def unnoticed(self) -> list[Fault]:
        """Faults of which nothing was said that asks for something."""
        return [fault for fault, said in self.faulty if not said.verdicts and not said.warned]

    @property
    def alarms(self) -> list[tuple[str, Said]]:
        return [(name, said) for name, said in self.healthy if said.verdicts or said.warned]


def measured() -> Measured:
    return Measured(
        [(fault, said_of(fault.train)) for fault in faults()],
        [(name, said_of(train)) for name, train in ODD.items()],
    )


def text_of(found: Measured) -> str:
    """Returns the table of docs/monitoring.md, and the shares below."""
    rows: dict[str, list[tuple[Fault, Said]]] = {}
    for pair in found.faulty:
        rows.setdefault(pair[0].kind, []).append(pair)
    lines = ["| fault | verdict | right of |", "|---|---|---|"]
    for kind, pairs in rows.items():
        right = sum(fault.is_right(said) for fault, said in pairs)
        lines.append(f"| {kind} | {pairs[0][0].verdict} | {right} of {len(pairs)} |")
    right = len(found.faulty) - len(found.wrong)
    lines += [
        "",
        f"{right} of {len(found.faulty)} faults in {len(SETTINGS)} settings have the right verdict,"
        f" {len(found.unnoticed)} none; {len(found.alarms)} false alarms in "
        f"{len(found.healthy)} healthy trainings.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    result = measured()
    print(text_of(result))
    for fault, said in result.wrong:
        print("wrong:", fault.kind, fault.place, fault.setting, said)
    for name, said in result.alarms:
        print("false alarm:", name, said)
