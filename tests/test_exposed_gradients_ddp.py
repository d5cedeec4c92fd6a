"""`unscale_` under DistributedDataParallel: its views of buckets are back after the step."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import warnings
from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mpcore_testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
SCALE = 2.0**6
WAYS = ("zero_grad", "zero_grad(False)", "None", "nothing")


def train(unscales: bool, view: bool, static: bool, no_sync: bool, way: str) -> list[Any]:
    """Returns masters after some steps; `nothing` leaves gradients where they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).half()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.StaticLossScale(SCALE))
    ddp = nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=view, static_graph=static
    )
    for step in range(4):
        # torch learns a static graph from the first pass, which must not be one without a sync
        for micro_batch in range(2 if no_sync and step else 1):
            waits = (
                ddp.no_sync() if no_sync and step and micro_batch == 0 else contextlib.nullcontext()
            )
            x = torch.full((2, 4), float(dist.get_rank() + 1 + step + micro_batch) / 8).half()
            with waits:
                optimizer.backward(ddp(x).float().square().mean())
        own = [p.grad for p in model.parameters()]
        if unscales:
            optimizer.unscale_()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), own, strict=True))
        if way == "None":
            for param in model.parameters():
                param.grad = None
        elif way != "nothing":
            optimizer.zero_grad(set_to_none=way == "zero_grad")
    return [optimizer.state[p]["master"].tolist() for p in model.parameters()]


def work(rank: int, port: str, folder: str) -> None:
    """One rank: every combination, unscaled and not."""
    torch.set_num_threads(1)
    # what DDP writes at the end of a pass is no clip
    warnings.filterwarnings("error", message="gradients were made smaller")
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {}
    for view, static, no_sync, way in itertools.product(*[[False, True]] * 3, WAYS):
        case = (view, static, no_sync, way)
        found[str(case)] = [train(unscales, *case) for unscales in (False, True)]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_ddp_trains_on_after_gradients_were_shown(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(__file__, port, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len(first) == 32
    for case, (plain, unscaled) in first.items():
        assert plain == unscaled, case
