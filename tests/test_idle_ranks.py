"""Each rank with a monitor is told of training that goes nowhere, once; others wait for none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpcore_testing import idle_ranks
from mpcore_testing.ranks import OF_RANKS, run_ranks

pytestmark = OF_RANKS


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(idle_ranks.__file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("lost", "no weight moves: in each of 5 readings from step 7 to 39"),
        ("zeros", "all gradients were 0 in each of the last 32 steps"),
        ("hidden", "Weights are not finite after step 7: weight."),
    ],
)
def test_each_rank_is_told_once(said: list[dict[str, list[str]]], name: str, part: str) -> None:
    for rank in said:
        (text,) = rank[name]
        assert part in text


def test_a_rank_that_watches_alone_is_told_and_nobody_waits(
    said: list[dict[str, list[str]]],
) -> None:
    assert said[0]["lost, one watches"] == []
    (text,) = said[1]["lost, one watches"]
    assert "no weight moves" in text


def test_what_is_healthy_is_told_of_nowhere(said: list[dict[str, list[str]]]) -> None:
    assert [rank["healthy"] for rank in said] == [[], []]
