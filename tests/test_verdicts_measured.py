"""Each fault of a table has its verdict, and nothing healthy an alarm."""

from __future__ import annotations

import pytest

from mpcore_testing.odd_trainings import ODD
from mpcore_testing.verdict_cases import Fault, Said, faults, said_of
from mpcore_testing.verdict_table import Measured, text_of

FAULTS = list(faults())


def named(fault: Fault) -> str:
    return f"{fault.kind}, {fault.place}, {fault.setting}"


@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_a_fault_has_its_verdict(fault: Fault) -> None:
    said = said_of(fault.train)
    assert fault.is_right(said), said


@pytest.mark.parametrize("name", ODD)
def test_what_is_healthy_has_no_alarm(name: str) -> None:
    said = said_of(ODD[name])
    assert (said.verdicts, said.warned) == ([], [])


def test_the_table_is_as_large_as_it_has_to_be() -> None:
    assert len(FAULTS) >= 40
    assert len(ODD) >= 20


def test_what_nobody_hears_of_is_counted_as_wrong() -> None:
    nothing = Said([], [], [])
    found = Measured([(fault, nothing) for fault in FAULTS[:2]], [("odd", nothing)])
    assert found.unnoticed == FAULTS[:2]
    assert "0 of 2 faults" in text_of(found)
    assert "2 none; 0 false alarms in 1" in text_of(found)
    assert Measured([], [("odd", Said([], [], ["no weight moves"]))]).alarms
