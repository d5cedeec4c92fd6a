"""Two ranks that hold parts of one model skip together, or step together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpcore
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mpcore_testing.ranks import OF_RANKS, run_ranks

INF = float("inf")
pytestmark = OF_RANKS


def scaled_step(
    scaler: Any, params: list[Any], grads: list[Any], fused: bool, unscales: bool
) -> list[Any]:
    """What a step over given gradients does on this rank: the scale, and the parameters here."""
    # torch has a fused AdamW for DTensors and no fused SGD; the first step of both goes down by lr
    kind = torch.optim.AdamW if fused else torch.optim.SGD
    optimizer = kind(params, lr=0.5, weight_decay=0.0, fused=fused)
    scaler.scale(torch.ones(()))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    held = [p.to_local() if isinstance(p, DTensor) else p for p in params]
    return [scaler.get_scale(), scaler.last_step.skipped, *(p.detach().tolist() for p in held)]


def plain(rank: int, bad: bool, fused: bool, unscales: bool) -> list[Any]:
    """FSDP1: each rank has a part of a flat parameter; only rank 0 overflows."""
    scaler = mpcore.GradScaler("cpu", init_scale=8.0, process_group=distributed.group.WORLD)
    param = nn.Parameter(torch.ones(2))
    grad = torch.tensor([8.0, INF if bad and rank == 0 else 8.0])
    return scaled_step(scaler, [param], [grad], fused, unscales)


def mixed(rank: int, bad: bool, fused: bool, unscales: bool) -> list[Any]:
    """A replicated and a sharded DTensor, and a plain tensor; rank 0's shard overflows."""
    mesh = init_device_mesh("cpu", (2,))
    places = (Replicate(), Shard(0))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [place])) for place in places]
    params.append(nn.Parameter(torch.ones(2)))
    full = torch.full((4,), 8.0)
    spoilt = torch.tensor([INF if bad else 8.0, 8.0, 8.0, 8.0])
    grads = [
        distribute_tensor(full, mesh, [places[0]]),
        distribute_tensor(spoilt, mesh, [places[1]]),
    ]
    grads.append(torch.full((2,), 8.0))
    scaler = mpcore.GradScaler("cpu", init_scale=8.0)
    if fused:  # torch's fused steps take no such lists
        return scaled_step(scaler, params[1:2], grads[1:2], fused, unscales)
    return scaled_step(scaler, params, grads, fused, unscales)


def idle(rank: int, bad: bool, fused: bool, unscales: bool) -> list[Any]:
    """A rank without gradients takes part in the decision."""
    mesh = init_device_mesh("cpu", (2,))
    shards = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([shards], lr=0.5)
    scaler = mpcore.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    if rank == 0:
        value = torch.tensor([INF if bad else 8.0])
        shards.grad = DTensor.from_local(value, mesh, [Shard(0)])
    scaler.step(optimizer)
    scaler.update()
    return [scaler.get_scale(), scaler.last_step.skipped]


def expanded(rank: int, bad: bool, fused: bool, unscales: bool) -> list[Any]:
    """Gradients that are one value, repeated: nothing can be written to them as they are."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    value = torch.tensor(INF if bad and rank == 1 else 8.0).expand(2)
    grad = DTensor.from_local(value, mesh, [Shard(0)])
    return scaled_step(mpcore.GradScaler("cpu", init_scale=8.0), [param], [grad], fused, unscales)


def computed(rank: int, mode: str) -> float:
    """The scale that is computed from gradients of which rank 1 has the largest one."""
    group = distributed.group.WORLD if mode == "group" else None
    rule = mpcore.HeadroomLossScale(8.0, spare_bits=2)
    scaler = mpcore.GradScaler.of(rule, "cpu", process_group=group)
    grad = torch.full((2,), 8.0 * 2.0 ** -(10 - 4 * rank))
    param: Any = torch.ones(2)
    if mode == "dtensor":
        mesh = init_device_mesh("cpu", (2,))
        param = DTensor.from_local(param, mesh, [Shard(0)])
        grad = DTensor.from_local(grad, mesh, [Shard(0)])
    scaled_step(scaler, [nn.Parameter(param)], [grad], False, False)
    return scaler.get_scale()


CASES = [
    (case, bad, fused, unscales)
    for case in (plain, mixed, idle, expanded)
    for bad in (False, True)
    for fused in (False, True)
    for unscales in (False, True)
    if case is not idle or not (fused or unscales)
]


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = [case(rank, *options) for case, *options in CASES]
    scales = [computed(rank, mode) for mode in ("dtensor", "group")]
    torch.save((results, scales), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_agree_whoever_overflows_and_step_as_one(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for _, scales in ranks:  # 2^(16 - 2) over the power of two above 2^-6
        assert scales == [2.0**19] * 2
    for (case, bad, *_), *results in zip(CASES, *(cases for cases, _ in ranks), strict=True):
        for scale, skipped, *params in results:
            assert (scale, skipped) == ((4.0, True) if bad else (8.0, False)), case
            expected = 1.0 if bad else 0.5
            assert [v for values in params for v in values] == pytest.approx(
                [expected] * sum(map(len, params)), abs=1e-6
            ), case
