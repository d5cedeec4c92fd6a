"""Ranks that act as one: they skip together, clip by one norm, and move one loss scale.

The oracle is the same training in one process, or exact arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import mpcore
import pytest
import torch
from torch import nn

from mpcore_testing import rank_runs
from mpcore_testing.rank_accidents import (
    behind,
    copied,
    dropped,
    lacking,
    not_there_yet,
    refused,
    reported,
    thawed,
    warned,
    zeros_first,
)
from mpcore_testing.rank_cases import (
    SCALE,
    collectives,
    copies,
    experts,
    headroom,
    idle,
    shards,
    stages,
    summed,
    values,
    wrapped,
)
from mpcore_testing.ranks import OF_RANKS, found_on, of

pytestmark = OF_RANKS


@pytest.fixture(scope="module", params=[2, 3], ids=lambda size: f"{size}-ranks")
def world(request: Any, tmp_path_factory: Any) -> list[Any]:
    return found_on(rank_runs.__file__, tmp_path_factory.mktemp("ranks"), request.param)


def alone(path: str, inner: str, dtype: str, clips: bool) -> Any:
    """The same training in one process, whose own gradient overflows."""
    return copies(0, path, inner, dtype, clips, bad=0)


def test_copies_skip_and_clip_as_one_process_does(world: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(mpcore, "Ranks", lambda: None)
    for (path, inner, dtype, clips, _), ranks in of(world, copies):
        expected = alone(path, inner, dtype, clips)
        assert [step["skipped"] for step in expected] == [True, False, False, True, False]
        for found in ranks:
            for step, other in zip(found, expected, strict=True):
                for name in ("skipped", "scale", "counters"):
                    assert step[name] == other[name], (path, inner, name)
                if clips and not step["skipped"]:
                    assert step["norm"] == pytest.approx(other["norm"], rel=1e-6)
                # the norm is added up in another order than one process adds it
                assert_close(step["masters"], other["masters"], 1e-6 if clips else 0.0)
        assert all(found == ranks[0] for found in ranks) or any_nan(ranks)


def any_nan(ranks: list[Any]) -> bool:
    """Norms of skipped steps are equal as well, but for NaN."""
    strip = [[{k: v for k, v in step.items() if k != "norm"} for step in found] for found in ranks]
    norms = [[step["norm"] for step in found if not step["skipped"]] for found in ranks]
    return all(s == strip[0] for s in strip) and all(n == norms[0] for n in norms)


def assert_close(one: Any, other: Any, relative: float) -> None:
    a = torch.tensor([v for values in one for v in values], dtype=torch.float64)
    b = torch.tensor([v for values in other for v in values], dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=relative, atol=0.0)


def norms_of(ranks: list[Any], step: int, shared: list[int]) -> float:
    """The norm of gradients that are half the weights before the step, in exact sums."""
    parts = []
    for rank, found in enumerate(ranks):
        for index, weights in enumerate(found[step]["weights"]):
            if rank == 0 or index not in shared:
                parts += [(w / 2) ** 2 for w in weights]
    return math.sqrt(math.fsum(parts))


@pytest.mark.parametrize("case", [stages, experts], ids=lambda case: case.__name__)
def test_parts_skip_as_one_and_clip_by_the_norm_of_the_whole(world: list[Any], case: Any) -> None:
    for (_, clips, _), ranks in of(world, case):
        skips = [[step["skipped"] for step in found] for found in ranks]
        assert skips == [[step == 1 for step in range(len(ranks[0]))]] * len(ranks)
        scales = [[(step["scale"], step["counters"]) for step in found] for found in ranks]
        assert all(each == scales[0] for each in scales)
        for found in ranks:  # a skipped step changes nothing
            assert found[1]["masters"] == found[0]["masters"]
        if case is experts:  # all ranks have the same layer
            assert all(f[-1]["masters"][0] == ranks[0][-1]["masters"][0] for f in ranks)
        if not clips:
            continue
        for step in range(2, len(ranks[0])):
            norms = {found[step]["norm"] for found in ranks}
            assert len(norms) == 1  # bit by bit
            # weights of the step before are what the gradients are made of
            expected = norms_of(ranks, step - 1, shared=[0] if case is experts else [])
            assert norms.pop() == pytest.approx(expected, rel=2e-3)  # gradients are float16


def test_a_rank_without_gradients_takes_part(world: list[Any]) -> None:
    for _, ranks in of(world, idle):
        # step 1 overflows on the rank that has gradients, step 2 is none
        assert (
            ranks == [[(SCALE, 1, 0), (SCALE / 2, 2, 1), (SCALE / 2, 2, 1), (SCALE / 2, 3, 1)]] * 2
        )


def test_sums_are_means_over_ranks_in_float32(world: list[Any]) -> None:
    torch.manual_seed(0)
    start = nn.Linear(4, 1).weight[0].tolist()
    # the mean over ranks of the mean over micro-batches of (rank + 1) (micro-batch + 1) / 8
    gradient = sum((rank + 1) * (k + 1) / 8 for rank in (0, 1) for k in range(4)) / 8
    for _, ranks in of(world, summed):
        assert ranks[0]["masters"] == ranks[1]["masters"]
        expected = [weight - 2.0**-6 * gradient for weight in start]
        assert ranks[0]["masters"][0][0] == pytest.approx(expected, abs=2e-4)  # of float16 inputs


def test_the_largest_gradient_of_all_ranks_makes_the_scale(world: list[Any]) -> None:
    for _, ranks in of(world, headroom):
        top = max(largest for largest, _ in ranks)
        expected = 2.0 ** (16 - 2 - math.frexp(top)[1])
        assert [scale for _, scale in ranks] == [expected, expected]


def test_a_step_has_one_collective_and_nothing_else_has_any(world: list[Any]) -> None:
    for (_, way), ranks in of(world, collectives):
        expected = ["clip_grad_norm_"] if way == "clip_grad_norm_" else ["step"]
        assert ranks == [expected, expected]


def test_ranks_that_did_not_begin_alike_are_told_on_every_rank(world: list[Any]) -> None:
    told = {options[0]: ranks for options, ranks in of(world, refused)}
    for message in told["other masters"]:
        assert "expected equal masters of group 0, parameter 0" in message
        assert "ranks [1] that have other values" in message
    own = [message.split("exponent of the loss scale ")[1][:1] for message in told["other scale"]]
    assert own == ["7", "8"]
    assert all("7.5 on average" in message for message in told["other scale"])
    assert all("no scale() on any rank" in message for message in told["no scale"])


def test_what_writes_behind_masters_is_refused(world: list[Any]) -> None:
    for (kind,), ranks in of(world, behind):
        for message in ranks:
            assert f"got {kind}, which writes to them behind the masters" in message
            assert "ranks=mpcore.Ranks()" in message


def test_what_ranks_cannot_agree_about_yet_is_an_error(world: list[Any]) -> None:
    told = {options[0]: ranks for options, ranks in of(world, not_there_yet)}
    assert all("expected an optimizer that decides alone" in m for m in told["add_loss"])
    assert all("wants the largest gradient of each pass" in m for m in told["accumulate"])


def test_a_copy_of_an_optimizer_agrees_as_well(world: list[Any]) -> None:
    for _, ranks in of(world, copied):
        for own, copy in ranks:
            assert own["skipped"]
            del own["norm"], copy["norm"]  # NaN
            assert own == copy


def test_a_report_says_that_it_was_another_rank(world: list[Any]) -> None:
    for _, ranks in of(world, reported):
        assert "No gradient of this rank overflowed" in ranks[0]
        assert "group 0, parameter 1" in ranks[1]


def test_what_no_step_took_no_rank_counts_alone(world: list[Any]) -> None:
    for _, ranks in of(world, dropped):
        assert ranks == [(SCALE, 1, 0)] * 2


def test_parameters_that_come_later_are_compared_and_count(world: list[Any]) -> None:
    for (way,), ranks in of(world, thawed):
        assert ranks[0]["masters"] == ranks[1]["masters"], way
        assert [found["counters"] for found in ranks] == [(3, 1)] * 2


def test_zeros_of_one_rank_are_no_step_before_training(world: list[Any]) -> None:
    for _, ranks in of(world, zeros_first):
        assert ranks == [(2, SCALE * 2)] * 2


def test_a_sum_that_one_rank_has_is_halved_for_both(world: list[Any]) -> None:
    for _, ranks in of(world, lacking):
        assert ranks[0] == ranks[1]
        # half the weight, times the rate, over two ranks
        assert ranks[0] == pytest.approx([2.0**-6 / 4] * 2, rel=1e-2)


def test_shards_of_a_mesh_agree_without_being_told(world: list[Any]) -> None:
    for (clips, _), ranks in of(world, shards):
        for step, found in enumerate(zip(*ranks, strict=True)):
            for each in found:
                assert each["skipped"] == (step == 1,) * 2
                assert each["scales"][0] == each["scales"][1]
                for one, other in zip(*each["weights"], strict=True):
                    torch.testing.assert_close(
                        torch.tensor(one), torch.tensor(other), rtol=0.0, atol=2.0**-22
                    )  # ranks add halves of a mean of gradients in another order
                if clips and step != 1:
                    assert each["norms"][0] == pytest.approx(each["norms"][1], rel=1e-6)
            assert found[0]["weights"] == found[1]["weights"]


def test_an_optimizer_that_was_told_of_no_ranks_says_so_once(world: list[Any]) -> None:
    for _, ranks in of(world, warned):
        assert [len(heard) for heard in ranks] == [1, 1]
        assert "Pass ranks=mpcore.Ranks()" in ranks[0][0]


def test_what_is_no_process_group_is_refused() -> None:
    params = values((2,), seed=0)
    with pytest.raises(mpcore.ArgumentTypeError, match=r"expected mpcore\.Ranks"):
        wrapped(params, "fused", ranks="all")
    with pytest.raises(mpcore.ArgumentError, match="init_process_group"):
        wrapped(params, "fused")
