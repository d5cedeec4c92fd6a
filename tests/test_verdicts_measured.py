"""Each fault of a table has its verdict, and nothing healthy an alarm."""

from __future__ import annotations

import pytest

from mpcore_testing.odd_trainings import ODD
from mpcore_testing.verdict_cases import Fault, faults, said_of
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


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 40
    assert len(ODD) >= 20


def test_what_is_missed_is_counted_as_wrong() -> None:
    fault = Fault("none", "", "float16", ODD["one layer"], "weights", "first.weight")
    found = Measured([(fault, said_of(fault.train))], [])
    assert found.unnoticed == [fault]
    assert "0 of 1 faults" in text_of(found)
    assert "1 none; 0 false alarms" in text_of(found)
