"""Monitors that read over all ranks; run on each rank of one group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import mpcore
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import distribute_tensor

from mpcore_testing.rank_cases import SCALE, wrapped
from mpcore_testing.rank_layouts import LAYOUTS, make_model

STEPS, BAD = 3, 1
#: By the number of ranks.
OF_SIZE = {2: ("fsdp", "tensor", "copies"), 4: ("fsdp", "hsdp", "2-D", "copies")}


def gradient_of(name: str, shape: Any, step: int) -> Tensor:
    """Of a whole parameter, scaled: with zeros, subnormal values and, in one step, an infinity."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    grad = torch.randn(shape, generator=draw) * 2.0 ** torch.randint(-20, 3, shape, generator=draw)
    grad[torch.rand(shape, generator=draw) < 0.1] = 0.0
    if step == BAD and name == "2.weight":
        grad[-1, 1] = torch.inf
    return grad.half()


def watched(
    model: nn.Module, optimizer: Any, loss: float | None, scaler: Any = None, **options: Any
) -> list[Any]:
    """The readings of each step."""
    found: list[Any] = []
    monitor = mpcore.Monitor(optimizer, model, every=1, sinks=[found.append], **options)
    for step in range(STEPS):
        if loss is not None:
            (scaler or optimizer).scale(torch.tensor(loss + step))
        for name, param in model.named_parameters():
            grad: Any = gradient_of(name, param.shape, step)
            if hasattr(param, "placements"):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    monitor.close()
    return [record for record in (one.to_dict() for one in found) if record["kind"] == "reading"]


def laid_out(rank: int, layout: str) -> list[Any]:
    """A model in one layout."""
    model = make_model(torch.float16)
    ranks = mpcore.Ranks() if layout == "copies" else None
    if layout != "copies":
        LAYOUTS[layout](model)
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=ranks)
    return watched(model, optimizer, 1.0 + rank, over_ranks=True)


def scaled(rank: int) -> list[Any]:
    """Shards whose steps somebody else's scaler drives."""
    model = make_model(torch.float16)
    LAYOUTS["fsdp"](model)
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=None)
    scaler = mpcore.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    return watched(model, optimizer, 1.0 + rank, scaler, over_ranks=True)


def stages(rank: int) -> list[Any]:
    """Stages that call other parameters by the same names; the last has the loss."""
    model = nn.Linear(3 + rank, 2).half()
    ranks = mpcore.Ranks(replicas={"*": None})
    optimizer = wrapped(model.named_parameters(), "fused", "AdamW", ranks=ranks)
    last = rank == distributed.get_world_size() - 1
    return watched(model, optimizer, 5.0 if last else None, over_ranks=True)


def work(rank: int, folder: str, size: str) -> None:
    distributed.init_process_group(
        *("gloo", f"file://{folder}/s"),
        rank=rank,
        world_size=int(size),
        timeout=timedelta(seconds=60),  # of ranks that no longer match
    )
    torch.set_num_threads(1)
    found = {layout: laid_out(rank, layout) for layout in OF_SIZE[int(size)]}
    found |= {"scaled": scaled(rank), "stages": stages(rank)}
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
