"""The advice of every `StageError`, followed to the letter: training goes on and is right.

Rows are provoked in each setting in which people meet them: their loop may clear gradients by
`model.zero_grad()`, step by a GradScaler or with a closure, or have a second optimizer. Beside each
runs a twin that never went wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mpcore
import pytest

from mpcore_testing.bits import same_bits
from mpcore_testing.engines import ENGINES, Engine
from mpcore_testing.stage_errors.rows import ROWS
from mpcore_testing.stage_errors.sites import site_of
from mpcore_testing.stage_errors.world import Row, World

FORM = re.compile(r"^[^:]+: expected .+, got .+[.:] .*[A-Z].+\.$", re.S)


def engines_of(row: Row) -> list[Engine]:
    """Those that get there."""
    return [e for e in ENGINES if not (row.general_only if e.fused else row.fused_only)]


def cases() -> Iterator[Any]:
    """Every row in its first setting on every engine; in the others on one engine in turn."""
    for place, row in enumerate(ROWS):
        engines = engines_of(row)
        for number, setting in enumerate(row.settings):
            turn = engines[(place + number) % len(engines)]
            for engine in engines:
                marks = [] if number == 0 or engine == turn else [pytest.mark.exhaustive]
                name = f"{row.name}, {setting}, {engine}"
                yield pytest.param(row, setting, engine, id=name, marks=marks)


def begun(row: Row, setting: str, engine: Engine) -> World:
    world = World(engine, setting, **row.options)
    if row.begun:
        world.step(1)
    return world


@pytest.mark.filterwarnings("ignore:.*were written to by others")
@pytest.mark.parametrize(("row", "setting", "engine"), list(cases()))
def test_whoever_follows_the_advice_goes_on_as_if_nothing_had_happened(
    row: Row, setting: str, engine: Engine
) -> None:
    world, twin = begun(row, setting, engine), begun(row, setting, engine)
    with pytest.raises(mpcore.StageError) as error:
        row.provoke(world)
    message = str(error.value)
    assert site_of(error.tb) == row.site
    assert row.says in message
    assert FORM.match(message)
    row.follow(world)
    row.twin(twin)
    for one in (world, twin):
        one.step(3)
        one.step(4)
    assert same_bits(world.contents(), twin.contents())
    assert [o.skipped_steps for o in world.optimizers] == [o.skipped_steps for o in twin.optimizers]


def calls_in(text: str) -> set[str]:
    return set(re.findall(r"(\w+)\(", text))


@pytest.mark.parametrize("site", sorted({row.site for row in ROWS}))
def test_every_call_that_a_message_names_as_a_remedy_is_followed(site: str) -> None:
    rows = [row for row in ROWS if row.site == site]
    followed = set.union(*(calls_in(row.says) for row in rows))
    for row in rows:
        world: Any = begun(row, row.settings[0], engines_of(row)[0])
        with pytest.raises(mpcore.StageError) as error:
            row.provoke(world)
        advice = str(error.value).partition(", got ")[2]
        advice = re.split(r"[.:] (?=[A-Z])|; ", advice, maxsplit=1)[1]
        assert calls_in(advice) <= followed, row.name
