"""Ranks that run out of batches: all end with the masters, moments and scale of one process.

The oracle has the gradients as the rank that trained longest has got them, and decides alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcore_testing import rank_joins
from mpcore_testing.bits import same_bits
from mpcore_testing.rank_joins import AFTER, BAD, joined, refused, whole_state
from mpcore_testing.rank_layouts import make_model, replayed
from mpcore_testing.ranks import OF_RANKS, found_on, of

pytestmark = OF_RANKS


@pytest.fixture(scope="module", params=[2, 3], ids=lambda size: f"{size}-ranks")
def world(request: Any, tmp_path_factory: Any) -> list[Any]:
    return found_on(rank_joins.__file__, tmp_path_factory.mktemp("joins"), request.param)


def same_state(one: Any, other: Any) -> bool:
    if one["mpcore"] != other["mpcore"] or one["state"].keys() != other["state"].keys():
        return False
    pairs = [(one["state"][key], other["state"][key]) for key in one["state"]]
    return all(
        a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a) for a, b in pairs
    )


def test_every_rank_ends_with_the_bits_of_one_process_and_goes_on_with_them(
    world: list[Any],
) -> None:
    for (path, way, counts, _), ranks in of(world, joined):
        case = (path, way, counts)
        longest = ranks[counts.index(max(counts))]
        # every rank trained as often as it had batches, and then together
        assert [found["end"][0] for found in ranks] == list(counts), case
        expected = replayed(longest, "float16", path, "AdamW", way)["steps"]
        assert len(expected) == max(counts) + AFTER
        assert [step["skipped"] for step in expected] == [
            step == BAD for step in range(len(expected))
        ], case
        for mine, other in zip(longest["steps"], expected, strict=True):
            for name in ("skipped", "scale", "counters"):
                assert mine[name] == other[name], (case, name)
            assert mine["skipped"] or mine["norm"] == other["norm"], case
            for one, another in zip(mine["weights"], other["weights"], strict=True):
                assert same_bits(one, another), case
        for found in ranks:
            assert found["end"][1] == [], case  # no weight that is not its rounded master
            assert same_state(found["end"][2], longest["end"][2]), case
            assert same_state(found["last"], longest["last"]), case
            for mine, other in zip(found["steps"][-AFTER:], expected[-AFTER:], strict=True):
                for one, another in zip(mine["weights"], other["weights"], strict=True):
                    assert same_bits(one, another), case


MESSAGES = {
    "no ranks": "expected an optimizer with ranks=mpcore.Ranks(), all of which hold copies",
    "experts": "expected an optimizer with ranks=mpcore.Ranks(), all of which hold copies",
    "order": "expected DistributedDataParallel before its optimizer",
    "closure": "step(closure): expected a step with one backward pass while ranks may run out",
    "accumulate": "accumulate(): expected a step with one backward pass while ranks may run out",
    "alone": "expected a Join over DistributedDataParallel and this optimizer, got one",
    "evaluated": "nothing",
}


def test_every_rank_is_told_what_cannot_be_joined(world: list[Any]) -> None:
    told = {what: ranks for (what,), ranks in of(world, refused)}
    assert told.keys() == MESSAGES.keys()
    for what, ranks in told.items():
        assert all(MESSAGES[what] in message for message in ranks), (what, ranks)


def test_state_of_one_process_is_told_from_another() -> None:
    """The comparison above can fail."""
    from mpcore_testing.rank_cases import wrapped

    states = []
    for steps in (1, 2):
        model = make_model(torch.float16)
        optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=None)
        for _ in range(steps):
            optimizer.backward(model(torch.ones(2, 4).half()).float().square().mean())
            optimizer.step()
        states.append(whole_state(optimizer))
    assert same_state(states[0], states[0])
    assert not same_state(*states)
