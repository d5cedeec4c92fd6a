"""Experts as DTensors train with the bits of one process, whichever rank overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcore_testing import rank_experts
from mpcore_testing.bits import same_bits
from mpcore_testing.rank_experts import BAD, STEPS, make_mixture, trained
from mpcore_testing.ranks import OF_RANKS, run_ranks

pytestmark = OF_RANKS


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size}-ranks")
def world(request: Any, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("experts")
    run_ranks(rank_experts.__file__, folder, request.param, count=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def test_every_rank_has_the_bits_of_one_process(world: list[dict[Any, Any]]) -> None:
    for case in world[0]:
        expected = trained(make_mixture(), *case)
        assert [step["skipped"] for step in expected] == [step == BAD for step in range(STEPS)]
        for rank in world:
            for step, (mine, right) in enumerate(zip(rank[case], expected, strict=True)):
                for name in ("skipped", "scale", "counters"):
                    assert mine[name] == right[name], (case, step, name)
                for one, other in zip(mine["weights"], right["weights"], strict=True):
                    assert same_bits([one], [other]), (case, step)
                for one, other in zip(mine["state"], right["state"], strict=True):
                    assert one.keys() == other.keys(), (case, step)
                    assert all(same_bits([one[key]], [other[key]]) for key in one), (case, step)
                assert mine["norm"] == world[0][case][step]["norm"] or mine["skipped"]
