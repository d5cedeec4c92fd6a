"""Split masters of sharded parameters and of copies: DTensors beside DTensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpcore_testing import split_runs
from mpcore_testing.ranks import OF_RANKS, found_on, of

pytestmark = OF_RANKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Where two ranks save, and three load."""
    found: Path = tmp_path_factory.mktemp("split")
    return found


@pytest.fixture(scope="module")
def world(folder: Path) -> list[Any]:
    return found_on(split_runs.__file__, folder, 2)


def test_masters_have_the_bits_of_float32_ones_in_every_layout(world: list[Any]) -> None:
    for (layout, *case), ranks in of(world, split_runs.same_as_float32):
        for same, kinds, skips in ranks:
            assert same, (layout, case)
            plain = {"Tensor torch.int16"} if layout == "tensor" else set()
            assert kinds == {"DTensor torch.int16", *plain}
            assert skips == [False, True, True, False], (layout, case)


def test_what_two_ranks_saved_goes_on_with_the_same_bits_on_three(
    world: list[Any], folder: Path
) -> None:
    for case, ranks in of(found_on(split_runs.__file__, folder, 3), split_runs.resumed):
        assert ranks == [(True, True)] * 3, case


def test_checkpoints_go_into_float32_masters_and_back(world: list[Any]) -> None:
    for case, ranks in of(world, split_runs.checkpoints):
        assert ranks == [(True, True, True)] * 2, case


def test_a_write_to_what_one_rank_holds_counts(world: list[Any]) -> None:
    for _, ranks in of(world, split_runs.edited):
        assert ranks == [(True, True)] * 2


def test_copies_whose_originals_differ_are_refused_on_every_rank(world: list[Any]) -> None:
    for _, ranks in of(world, split_runs.refused):
        assert all(message.startswith("step(): expected equal masters") for message in ranks)
