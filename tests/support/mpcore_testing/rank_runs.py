"""All cases of ranks that act as one, run on each of them in one process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

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
    PATHS,
    collectives,
    copies,
    experts,
    headroom,
    idle,
    shards,
    stages,
    summed,
)

CLIPS = (False, True)
CASES: list[tuple[Any, ...]] = [
    *((copies, p, "AdamW", "float16", c, 1) for p in PATHS for c in CLIPS),
    *((copies, p, "SGD", "bfloat16", True, 0) for p in PATHS),
    *((copies, p, "Lion", "bfloat16", True, 0) for p in ("fused", "general")),
    *((stages, p, c, bad) for p in PATHS for c in CLIPS for bad in (0, 1)),
    *((experts, p, c, 1) for p in PATHS for c in CLIPS),
    *((idle, p, c, 1) for p in PATHS for c in CLIPS),
    *((summed, p, told, synced) for p in PATHS for told in CLIPS for synced in CLIPS),
    *((headroom, p) for p in PATHS),
    *((collectives, p, w) for p in PATHS for w in ("", "clip_grad_norm_", "unscale_")),
    *((refused, what) for what in ("other masters", "other scale", "no scale")),
    *((behind, kind) for kind in ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer")),
    *((not_there_yet, what) for what in ("add_loss", "accumulate")),
    *((shards, c, bad) for c in CLIPS for bad in (0, 1)),
    (copied,),
    (reported,),
    (dropped,),
    *((thawed, way) for way in ("unfrozen", "added")),
    (zeros_first,),
    (lacking,),
    (warned,),
]


def work(rank: int, folder: str, size: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/s", rank=rank, world_size=int(size))
    torch.set_num_threads(1 + rank % 2)  # norms must not depend on it
    cases = (
        CASES if size == "2" else [case for case in CASES if case[0] in (copies, stages, experts)]
    )
    found = [(case.__name__, options, case(rank, *options)) for case, *options in cases]
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
