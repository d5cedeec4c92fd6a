"""What monitors of several ranks warn of; run on each rank of one group."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import mpcore
import torch
from torch import distributed, nn

#: name, the learning rate, what the loss is multiplied by, whose monitors there are
CASES = [
    ("lost", 1e-13, 1.0, (0, 1)),
    ("zeros", 1e-2, 0.0, (0, 1)),
    ("healthy", 1e-2, 1.0, (0, 1)),
    ("lost, one watches", 1e-13, 1.0, (1,)),
    ("hidden", 1e-2, 1.0, (0, 1)),
]


def trained(rank: int, name: str, lr: float, factor: float, watched: tuple[int, ...]) -> list[str]:
    """Returns what this rank was warned of in 70 steps."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4).half()
    with torch.no_grad():
        model.bias.zero_()
        if name == "hidden":
            model.weight[1, 2] = torch.inf
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr),
        mpcore.StaticLossScale(2.0**4),
        ranks=mpcore.Ranks(),
    )
    ddp = nn.parallel.DistributedDataParallel(model)
    monitor = mpcore.Monitor(optimizer, model, every=8) if rank in watched else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(70):
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * step + rank))
            outputs = ddp(batch.half().abs() + 0.1)
            loss = outputs.clamp(-4.0, 4.0).float().square().mean()
            optimizer.backward(loss * factor + 0.5)
            optimizer.step()
            optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return [str(one.message) for one in caught if "said once" in str(one.message)]


def work(rank: int, folder: str) -> None:
    distributed.init_process_group(
        *("gloo", f"file://{folder}/s"),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),  # of ranks that no longer match
    )
    torch.set_num_threads(1)
    found: dict[str, Any] = {case[0]: trained(rank, *case) for case in CASES}
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
