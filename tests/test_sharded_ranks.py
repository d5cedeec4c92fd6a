"""Sharded models: every layout trains with the bits of one process that has the same gradients.

What one process replays are the gradients as ranks have reduced them; how they reduce is torch's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from mpcore_testing import layout_runs, sharded_models
from mpcore_testing import sharded_accidents as accidents
from mpcore_testing.bits import same_bits
from mpcore_testing.rank_cases import SCALE
from mpcore_testing.rank_layouts import (
    BAD,
    STEPS,
    cast_later,
    driven,
    flat,
    muon,
    parted,
    replayed,
    trained,
)
from mpcore_testing.ranks import OF_RANKS, found_on, of

pytestmark = OF_RANKS


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size}-ranks")
def world(request: Any, tmp_path_factory: Any) -> list[Any]:
    return found_on(layout_runs.__file__, tmp_path_factory.mktemp("sharded"), request.param)


def test_every_layout_trains_with_the_bits_of_one_process(world: list[Any]) -> None:
    for (layout, dtype, path, inner, way, bad), ranks in of(world, trained):
        case = (layout, dtype, path, inner, way, bad)
        assert_of_one_process(ranks, (dtype, path, inner, way), bad, case)


def assert_of_one_process(
    ranks: list[Any], setting: tuple[str, str, str, str], bad: int, case: Any
) -> None:
    # the rank whose gradient overflows: a copy of that may be finite on others
    expected = replayed(ranks[bad], *setting)
    assert ranks[0]["path"] == expected["path"], case
    skips = [step["skipped"] for step in expected["steps"]]
    assert skips == [step == BAD for step in range(STEPS)], case
    for found in ranks:
        for step, other in zip(found["steps"], expected["steps"], strict=True):
            for name in ("skipped", "scale", "counters"):
                assert step[name] == other[name], (case, name)
            if not step["skipped"]:
                assert step["norm"] == other["norm"], case
            for one, another in zip(step["weights"], other["weights"], strict=True):
                assert same_bits(one, another), case
            for one, another in zip(step["state"], other["state"], strict=True):
                assert one.keys() == another.keys(), case
                for key in one:
                    assert same_bits(one[key], another[key]), (case, key)


def test_models_made_empty_checkpointed_and_compiled_need_nothing(world: list[Any]) -> None:
    for (kind, dtype, path, way, bad), ranks in of(world, sharded_models.made):
        case = (kind, dtype, path, way, bad)
        assert_of_one_process(ranks, (dtype, path, "AdamW", way), bad, case)
        for found in ranks:  # each was what it is said to be
            assert found["empty"] == (kind in ("meta", "all")), case
            assert found["passes"] == (2 * STEPS if kind == "checkpointed" else 0), case
            assert (found["graphs"] > 0) == (kind in ("compiled", "all")), case


def skips_of(ranks: list[Any]) -> list[list[bool]]:
    return [[step["skipped"] for step in found] for found in ranks]


def test_stages_that_are_sharded_skip_as_one_and_count_every_element_once(world: list[Any]) -> None:
    for (_, clips, _), ranks in of(world, parted):
        assert skips_of(ranks) == [[False, True, False]] * 4
        scales = [[(step["scale"], step["counters"]) for step in found] for found in ranks]
        assert all(each == scales[0] for each in scales)
        for step in (0, 2) if clips else ():
            norms = {found[step]["norm"] for found in ranks}
            assert len(norms) == 1  # bit by bit
            grads = [*ranks[0][step]["grads"], *ranks[2][step]["grads"]]  # of each stage once
            squares = math.fsum(float(g.double().square().sum()) for g in grads)
            scale = ranks[0][step - 1]["scale"] if step else 2.0**6
            assert norms.pop() == pytest.approx(math.sqrt(squares) / scale, rel=1e-6)


def test_flat_parameters_skip_as_one_and_clip_by_the_norm_of_the_whole(world: list[Any]) -> None:
    for (clips, _, _), ranks in of(world, flat):
        assert skips_of(ranks) == [[False, True, False]] * 2
        assert [step["scale"] for step in ranks[0]] == [step["scale"] for step in ranks[1]]
        if clips:
            assert ranks[0][0]["norm"] == ranks[1][0]["norm"]
            squares = math.fsum(found[0]["squares"] for found in ranks)
            assert ranks[0][0]["norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_an_optimizer_that_is_not_element_wise_sees_whole_matrices(world: list[Any]) -> None:
    for _, ranks in of(world, muon):
        # Muon iterates in bfloat16, whose sums depend on how a product is cut; over rows alone
        # its update is another by a quarter
        assert all(far < 0.05 for far in ranks)


def test_a_model_that_is_cast_after_it_was_sharded_keeps_its_digits(world: list[Any]) -> None:
    for _, ranks in of(world, cast_later):
        for found in ranks:
            assert found["same"], "the optimizer holds other parameters than the model"
            assert found["kept"]
            assert found["dtypes"] == {"torch.float16", "torch.float32"}
            assert (found["steps"], found["stale"]) == (1, [])


def test_a_reading_is_of_the_part_of_its_rank(world: list[Any]) -> None:
    of_all, of_one = (ranks for _, ranks in of(world, accidents.watched))
    readings = [found["reading"] for found in of_all]
    for rank, reading in enumerate(readings):
        assert (reading["rank"], reading["step"], reading["skipped"]) == (rank, 1, False)
        assert reading["lost_updates"] == 0.0  # no update of 2^-6 is lost
    assert readings[0]["grad_norm"] != readings[1]["grad_norm"]
    squares = math.fsum(reading["grad_norm"] ** 2 for reading in readings)
    assert of_all[0]["norm"] == of_all[1]["norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert sum(sum(reading["histogram"]) for reading in readings) == of_all[0]["values"]
    # one rank alone watches, and the others need not know
    assert of_one[0]["reading"] is None
    assert (of_one[1]["reading"]["rank"], of_one[1]["reading"]["skipped"]) == (1, True)


def test_a_grad_scaler_asks_all_ranks_of_a_square_once(world: list[Any]) -> None:
    for _, ranks in of(world, driven):
        assert ranks == [[(False, SCALE, 1), (True, SCALE / 2, 1), (False, SCALE / 2, 1)]] * 4


def test_copies_that_differ_in_last_digits_are_clipped_and_skipped_as_one(world: list[Any]) -> None:
    for _, ranks in of(world, accidents.apart):
        (master, here), (other, there) = ranks
        assert master != other
        assert here == there  # the norm bit by bit
        assert [skipped for skipped, _, _ in here] == [False, True, False]


def test_a_master_follows_the_memory_of_its_weight(world: list[Any]) -> None:
    assert [ranks for _, ranks in of(world, accidents.relaid)] == [[True, True]] * 2


def test_what_one_rank_adds_to_its_piece_after_a_look_is_seen(world: list[Any]) -> None:
    for (way,), ranks in of(world, accidents.overflown_since):
        assert ranks[1] == (True, True)
        # after a clip ranks have agreed already: the others hear of it in the next step
        assert way == "clip" or ranks[0] == (True, True)


def test_a_parameter_of_no_dimensions_keeps_its_step_count(world: list[Any]) -> None:
    for _, ranks in of(world, accidents.single_number):
        assert ranks == [("Tensor", True)] * 2


def test_a_master_that_somebody_wrote_to_is_stepped_from(world: list[Any]) -> None:
    for _, ranks in of(world, accidents.master_edited):
        assert ranks == [2.0 + 2.0 + 2.0] * 2


def test_a_row_that_one_rank_holds_may_be_written_before_the_first_step(world: list[Any]) -> None:
    for _, ranks in of(world, accidents.first_edit):
        assert ranks == [(1, 6 * 1.0 + 2 * 3.0)] * 2


def test_a_computed_scale_is_that_of_the_largest_gradient_of_all_shards(world: list[Any]) -> None:
    for _, ranks in of(world, accidents.computed):
        assert ranks == [2.0 ** (16 - 2 - 1)] * 2  # gradients of 1 have the exponent 1


def test_other_meshes_and_groups_that_are_too_small_are_refused(world: list[Any]) -> None:
    told = {options[0]: ranks for options, ranks in of(world, accidents.told)}
    assert all("expected a group of all ranks of the DTensors' mesh" in m for m in told["group"])
    assert all("'master']: expected one over the mesh of its parameter" in m for m in told["state"])
    assert all("expected one over the mesh of its parameter" in m for m in told["gradient"])
