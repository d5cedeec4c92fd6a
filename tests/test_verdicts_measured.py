"""Each fault of a table has its verdict, and nothing healthy an alarm; those missed are named."""

from __future__ import annotations

import pytest

from mpcore_testing.odd_trainings import ODD
from mpcore_testing.verdict_cases import Fault, faults, said_of
from mpcore_testing.verdict_table import Measured, text_of

FAULTS = list(faults())
NOTICED = [fault for fault in FAULTS if not fault.is_known_to_be_missed]
MISSED = [fault for fault in FAULTS if fault.is_known_to_be_missed]


def named(fault: Fault) -> str:
    return f"{fault.kind}, {fault.place}, {fault.setting}"


@pytest.mark.parametrize("fault", NOTICED, ids=named)
def test_a_fault_has_its_verdict(fault: Fault) -> None:
    said = said_of(fault.train)
    assert fault.is_right(said), said


@pytest.mark.parametrize("name", ODD)
def test_what_is_healthy_has_no_alarm(name: str) -> None:
    said = said_of(ODD[name])
    assert (said.verdicts, said.warned) == ([], [])


def test_what_is_missed_is_a_tenth_at_most() -> None:
    assert len(FAULTS) >= 40
    assert len(ODD) >= 20
    assert len(MISSED) * 10 <= len(FAULTS)


@pytest.mark.parametrize("fault", MISSED[:2], ids=named)
def test_what_is_missed_is_counted_as_wrong(fault: Fault) -> None:
    """Once it is noticed, it is no longer one that is known to be missed."""
    found = Measured([(fault, said_of(fault.train))], [])
    assert found.unnoticed == [fault]
    assert "0 of 1 faults" in text_of(found)
    assert "1 none; 0 false alarms" in text_of(found)
