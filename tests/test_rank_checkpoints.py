"""Checkpoints name parameters and whole shapes: saved on two ranks, loaded on four, three and one.

In either layout: DistributedDataParallel, or shards of FSDP2. What comes back is compared in bits,
and so is what the next step makes of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpcore_testing import rank_checkpoints
from mpcore_testing.bits import same_bits
from mpcore_testing.rank_checkpoints import folder_of
from mpcore_testing.ranks import OF_RANKS, run_ranks

pytestmark = OF_RANKS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    """Where two ranks have saved."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    run_ranks(rank_checkpoints.__file__, folder, 2, count=2)
    return folder


@pytest.mark.parametrize("size", [1, 3, 4])
def test_what_two_ranks_have_saved_comes_back_on_others_and_in_another_layout(
    saved: Path, size: int
) -> None:
    run_ranks(rank_checkpoints.__file__, saved, size, count=size)
    for rank in range(size):
        found = torch.load(saved / f"size{size}-rank{rank}.pt")
        for layout, here, setting, states in found:
            expected = torch.load(f"{folder_of(str(saved), layout, setting)}.pt")
            for state, other in zip(states, expected, strict=True):
                assert_same(state, other, (layout, here, setting))


def assert_same(state: Any, other: Any, case: Any) -> None:
    for name in ("scale", "counters"):
        assert state[name] == other[name], case
    for one, another in zip(state["weights"], other["weights"], strict=True):
        assert same_bits(one, another), case
    for one, another in zip(state["state"], other["state"], strict=True):
        assert one.keys() == another.keys(), case
        assert all(same_bits(one[key], another[key]) for key in one), case


def of_two(saved: Path) -> list[Any]:
    return [torch.load(saved / f"size2-rank{rank}.pt") for rank in range(2)]


def test_a_save_whose_end_is_missing_is_not_loaded(saved: Path) -> None:
    for (message, same), *_ in of_two(saved):
        assert "metadata" in message
        assert same


def test_a_whole_state_is_cut_for_shards(saved: Path) -> None:
    assert [same for _, same, _ in of_two(saved)] == [True, True]


def test_a_state_of_shards_is_refused_by_whole_parameters(saved: Path) -> None:
    for *_, message in of_two(saved):
        assert "expected a tensor, since the parameter is one, got a DTensor" in message
