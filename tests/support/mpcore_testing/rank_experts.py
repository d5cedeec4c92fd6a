"""Experts as DTensors over a mesh of their own, dense layers under FSDP2; run on each rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mpcore_testing.rank_cases import wrapped
from mpcore_testing.rank_layouts import state_of, take_step

STEPS, BAD = 4, 1
PATHS, WAYS = ("fused", "general"), ("", "clip", "unscale")


class Mixture(nn.Module):
    """A dense layer, a router, and four experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.router = nn.Linear(4, 6), nn.Linear(6, 4)
        self.experts = nn.Parameter(torch.empty(4, 6, 5))


def make_mixture() -> Mixture:
    torch.manual_seed(0)
    model = Mixture()
    nn.init.normal_(model.experts)
    return model.half()


def gradient_of(name: str, shape: Any, step: int, bad: int) -> Tensor:
    """Of a whole parameter, scaled; in one step that of one expert is not finite."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    grad = torch.randn(shape, generator=draw) * 8
    if step == BAD and name == "experts":
        grad[bad, 1, 2] = torch.inf
    return grad.half()


def lay_out(model: Mixture) -> None:
    """Experts over two ranks, copies of them over the others; the rest under FSDP2 over all."""
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "expert"))
    placed = distribute_tensor(model.experts.detach(), mesh, [Replicate(), Shard(0)])
    model.experts = nn.Parameter(placed)
    line = init_device_mesh("cpu", (size,))
    for layer in (model.dense, model.router):
        fully_shard(layer, mesh=line)


def trained(model: Mixture, path: str, way: str, bad: int) -> list[dict[str, Any]]:
    """What became of each step."""
    optimizer = wrapped(model.named_parameters(), path, "AdamW", ranks=None)
    found = []
    for step in range(STEPS):

        def evaluate(step: int = step) -> Tensor:
            loss = torch.zeros((), requires_grad=True)
            optimizer.scale(loss)
            for name, param in model.named_parameters():
                grad: Any = gradient_of(name, param.shape, step, bad)
                if hasattr(param, "placements"):
                    grad = distribute_tensor(grad, param.device_mesh, param.placements)
                param.grad = grad
            return loss.detach()

        norm = take_step(optimizer, model, evaluate, way)
        found.append({"norm": norm, **state_of(model, optimizer)})
    return found


def work(rank: int, folder: str, size: str) -> None:
    distributed.init_process_group(
        *("gloo", f"file://{folder}/s"),
        rank=rank,
        world_size=int(size),
        timeout=timedelta(seconds=60),  # of ranks that no longer match
    )
    torch.set_num_threads(1)
    found = {}
    for path in PATHS:
        for way in WAYS:
            for bad in (0, 3):  # on the first rank, or on the last of its mesh
                model = make_mixture()
                lay_out(model)
                found[path, way, bad] = trained(model, path, way, bad)
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
