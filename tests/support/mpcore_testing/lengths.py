"""How much of a long test `make test` runs, and how much `make test-exhaustive`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def long_run(value: Any, **options: Any) -> Any:
    """A value of a parameter that only `make test-exhaustive` takes."""
    return pytest.param(value, marks=pytest.mark.exhaustive, **options)


def short_and_long(short: Any, long: Any) -> list[Any]:
    """Two values of a parameter: one for `make test`, one for `make test-exhaustive`."""
    return [short, long_run(long)]


def few_of(values: Iterable[Any], few: Iterable[Any]) -> list[Any]:
    """All `values` of a parameter; those that are not among the `few` are exhaustive."""
    chosen = list(few)
    return [value if value in chosen else long_run(value) for value in values]


def in_turn(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """All pairs of two parameters; `make test` takes each value of both once or more, in turn."""
    return [
        pytest.param(
            one,
            other,
            marks=() if i % len(second) == j % len(first) else pytest.mark.exhaustive,
        )
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]


def each_in_turn(cases: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """All of some `pytest.param` with all values; `make test` takes one value of each, in turn."""
    return [
        pytest.param(
            *case.values,
            value,
            id=f"{case.id}-{getattr(value, '__name__', value)}",
            marks=() if i % len(values) == j else pytest.mark.exhaustive,
        )
        for i, case in enumerate(cases)
        for j, value in enumerate(values)
    ]
