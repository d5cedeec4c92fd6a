"""Ranks that hold parts of one model have to skip together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from mpcore.ranks import group_of, meshes_of, reduced, widest_of


def process_groups(optimizer: torch.optim.Optimizer, given: Any) -> list[Any]:
    """Returns the groups of ranks that share parameters of an optimizer.

    That is the widest mesh's, if it has the ranks of all others: one collective for all.

    Args:
        optimizer: Its parameters may be DTensors, of any meshes and placements. Those without a
            gradient count too: all ranks then ask the same groups in the same order.
        given: A process group that is one of them anyway; None: no.
    """
    meshes = meshes_of(p for group in optimizer.param_groups for p in group["params"])
    widest = widest_of(meshes) if meshes else None
    if widest is not None:
        found = [group_of(widest)]
    else:
        found = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    return found if given is None else [given, *found]


def _purpose() -> str:
    return "GradScaler.unscale_() or step(), whether a gradient of any rank overflows"


def largest_of_ranks(value: Tensor, groups: list[Any]) -> Tensor:
    """Returns the largest value that any rank of these groups has; waits for the others.

    Args:
        value: 0-d.
        groups: `torch.distributed.ProcessGroup`s, the same ones in the same order on all ranks.
    """
    for group in groups:
        value = reduced(value, group, distributed.ReduceOp.MAX, purpose=_purpose)
    return value
