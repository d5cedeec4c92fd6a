"""Ranks that hold parts of one model have to skip together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def process_groups(optimizer: torch.optim.Optimizer, given: Any) -> list[Any]:
    """Returns the groups of ranks that share parameters of an optimizer, without doubles.

    Args:
        optimizer: Its parameters may be DTensors, of any meshes and placements. Those without a
            gradient count too: all ranks then ask the same groups in the same order.
        given: A process group that is one of them anyway; None: no.
    """
    meshes = {
        param.device_mesh: None
        for group in optimizer.param_groups
        for param in group["params"]
        if hasattr(param, "device_mesh")
    }
    found = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    return found if given is None else [given, *found]


def any_rank(found_inf: Tensor, group: Any) -> Tensor:
    """Returns 1 on all ranks of a group if it is 1 on any of them; waits for the others.

    Args:
        found_inf: 0-d float32, 0 or 1.
        group: A `torch.distributed.ProcessGroup`.
    """
    from torch import distributed

    device = found_inf.device
    if distributed.get_backend(group) in ("gloo", "mpi"):
        device = torch.device("cpu")
    elif device.type == "cpu":  # NCCL and its like know accelerators only
        device = torch.device("cuda", torch.cuda.current_device())
    flag = found_inf.to(device, copy=True)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX, group)
    return flag.to(found_inf.device)
