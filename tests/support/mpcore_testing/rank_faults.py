"""Ranks that end in the midst of training: what the others are told, and how they go on."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import mpcore
import torch
from torch import distributed

from mpcore_testing.rank_cases import pass_over, seen, values, wrapped

#: What the survivors call when the other rank of their group is gone.
CALLS = ("step", "clip_grad_norm_", "accumulate")


def training(group: Any) -> tuple[Any, Any]:
    params = values((5, 3), seed=0)
    return params, wrapped(params, "fused", "AdamW", ranks=mpcore.Ranks(group))


def advance(optimizer: Any, params: Any, call: str) -> None:
    pass_over(optimizer, params, 0.5)
    if call == "clip_grad_norm_":
        optimizer.clip_grad_norm_(0.25)
    if call == "accumulate":
        optimizer.accumulate()
    optimizer.step()
    optimizer.zero_grad()


def bereft(call: str, group: Any, left: Any, ends: bool) -> Any:
    """Two steps, the second without a rank that has ended; then one of those that are left."""
    params, optimizer = training(group)
    advance(optimizer, params, call)
    if ends:
        os._exit(0)
    before, state = seen(optimizer, params), optimizer.state_dict()
    try:
        advance(optimizer, params, call)
    except mpcore.RankError as error:
        message = str(error)
    after = seen(optimizer, params)
    others, resumed = training(left)
    with torch.no_grad():
        for param, weight in zip(others, params, strict=True):
            param.copy_(weight)
    resumed.load_state_dict(state)
    advance(resumed, others, call)
    return message, before, after, seen(resumed, others)


def work(rank: int, folder: str) -> None:
    size = 2 + len(CALLS)
    distributed.init_process_group("gloo", f"file://{folder}/s", rank=rank, world_size=size)
    left = distributed.new_group([0, 1])
    # one survivor hears that a connection was closed, another waits for that one until its group
    # has no more time
    groups = [
        distributed.new_group([0, 1, 2 + number], timeout=timedelta(seconds=10))
        for number in range(len(CALLS))
    ]
    found = [
        bereft(call, group, left, ends=rank > 1)
        for number, (call, group) in enumerate(zip(CALLS, groups, strict=True))
        if rank in (0, 1, 2 + number)
    ]
    torch.save(found, f"{folder}/rank{rank}.pt")
    os._exit(0)  # the group of all has lost ranks: nobody can leave it together
