"""Compact moments, and weights without masters, of sharded parameters: the bits of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpcore_testing import compact_runs
from mpcore_testing.ranks import OF_RANKS, found_on, of

pytestmark = OF_RANKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Where two ranks save, and three load."""
    found: Path = tmp_path_factory.mktemp("compact")
    return found


@pytest.fixture(scope="module")
def world(folder: Path) -> list[Any]:
    return found_on(compact_runs.__file__, folder, 2)


def test_shards_of_rows_have_the_bits_of_one_process(world: list[Any]) -> None:
    for (_, moments), ranks in of(world, compact_runs.as_one_process):
        codes = {f"DTensor torch.{kind}" for kind in ("int8", "uint8", "float32")}
        kinds = codes if moments == "int8" else {"DTensor torch.bfloat16"}
        assert ranks == [(True, kinds, [False, False, True, False])] * 2, moments


def test_checkpoints_go_on_with_the_same_bits(world: list[Any]) -> None:
    for case, ranks in of(world, compact_runs.checkpoints):
        assert ranks == [(True, True)] * 2, case


def test_what_one_process_saved_as_it_lies_goes_on_in_shards(world: list[Any]) -> None:
    for case, ranks in of(world, compact_runs.of_one_process):
        assert ranks == [True, True], case


def test_what_two_ranks_saved_goes_on_with_the_same_bits_on_three(
    world: list[Any], folder: Path
) -> None:
    for case, ranks in of(found_on(compact_runs.__file__, folder, 3), compact_runs.resumed):
        assert ranks == [True] * 3, case


def test_shards_of_columns_keep_bfloat16_and_are_deterministic(world: list[Any]) -> None:
    for _, ranks in of(world, compact_runs.columns):
        for dtype, same, message in ranks:
            assert (dtype, same) == ("torch.bfloat16", True)
            assert "expected the placements of the parameter, got others" in message
