"""Readings over all ranks are those of one process that holds everything."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from torch import distributed, nn

from mpcore_testing import rank_monitors
from mpcore_testing.rank_cases import wrapped
from mpcore_testing.rank_layouts import make_model
from mpcore_testing.rank_monitors import BAD, OF_SIZE, STEPS, gradient_of, watched
from mpcore_testing.ranks import OF_RANKS, run_ranks

pytestmark = OF_RANKS


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size}-ranks")
def world(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("monitors")
    run_ranks(rank_monitors.__file__, folder, request.param, count=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def numbers(finding: dict[str, Any]) -> dict[str, float]:
    return {name: finding[name] for name in ("zeros", "subnormal", "largest", "headroom_bits")}


def test_every_rank_reads_what_one_process_does(world: list[dict[str, Any]]) -> None:
    model = make_model(torch.float16)
    alone = watched(model, wrapped(model.named_parameters(), "fused", "AdamW", ranks=None), 1.0)
    assert [reading["skipped"] for reading in alone] == [step == BAD for step in range(STEPS)]
    for layout in (*OF_SIZE[len(world)], "scaled"):
        for found in (rank[layout] for rank in world):
            for step, (mine, expected) in enumerate(zip(found, alone, strict=True)):
                case = (layout, step)
                assert (mine["rank"], mine["ranks"]) == (None, len(world)), case
                for name in ("step", "loss_scale", "skipped", "histogram", "headroom_bits"):
                    assert mine[name] == expected[name], (case, name)
                for name in ("zeros", "subnormal", "flushed"):
                    assert mine[name] == pytest.approx(expected[name], rel=1e-12), (case, name)
                assert mine["loss"] == sum(1.0 + r + step for r in range(len(world))) / len(world)
                assert mine["largest_loss"] == len(world) + step
                check_findings(case, mine["findings"], expected["findings"])
                if step != BAD:
                    # sums of squares in float64, in another order
                    assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)


def check_findings(case: Any, mine: list[Any], expected: list[Any]) -> None:
    assert [one["name"] for one in mine] == [one["name"] for one in expected], case
    for one, other in zip(mine, expected, strict=True):
        assert one["histogram"] == other["histogram"], (case, one["name"])
        assert one["shape"] == other["shape"], (case, one["name"])
        assert one["kinds"] == other["kinds"], (case, one["name"])
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-12), (case, one["name"])


def test_stages_say_whose_a_parameter_is_and_the_one_that_has_a_loss_tells_it(
    world: list[dict[str, Any]],
) -> None:
    for found in (rank["stages"] for rank in world):
        for step, reading in enumerate(found):
            assert reading["loss"] == 5.0 + step
            names = [one["name"] for one in reading["findings"]]
            assert names == [
                f"{name} (rank {rank})" for rank in range(len(world)) for name in ("weight", "bias")
            ]
            shapes = [one["shape"] for one in reading["findings"]]
            assert shapes == [s for rank in range(len(world)) for s in ([2, 3 + rank], [2])]
            weights = [gradient_of("weight", (2, 3 + rank), step) for rank in range(len(world))]
            bias = gradient_of("bias", (2,), step)
            zeros = sum(int((grad == 0).sum()) for grad in [*weights, *[bias] * len(world)])
            values = sum(grad.numel() for grad in weights) + 2 * len(world)
            assert reading["zeros"] == pytest.approx(zeros / values, rel=1e-12)


def test_an_optimizer_that_decides_alone_has_no_ranks_to_read_over() -> None:
    model = nn.Linear(2, 2).half()
    optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(mpcore.ArgumentError, match=r"over_ranks: .* decides alone.*Ranks\(\)"):
        mpcore.Monitor(optimizer, model, over_ranks=True)
    assert optimizer._stage.watcher is None


def work(rank: int, folder: str) -> None:
    """The second rank has no monitor, and ends after a step."""
    distributed.init_process_group(
        *("gloo", f"file://{folder}/s"),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    model = make_model(torch.float16)
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=mpcore.Ranks())
    if rank == 0:
        with pytest.raises(mpcore.RankError) as raised:
            watched(model, optimizer, 1.0, over_ranks=True)
        Path(folder, "said").write_text(str(raised.value), encoding="utf-8")
    else:
        optimizer.scale(torch.tensor(1.0))
        for name, param in model.named_parameters():
            param.grad = gradient_of(name, param.shape, 0)
        optimizer.step()


def test_a_rank_without_such_a_monitor_is_named_as_late(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert said.startswith("after step 1, readings of monitors: expected an answer of all 2 ranks")
    assert "The step was made. Every rank needs a Monitor with over_ranks=True" in said
