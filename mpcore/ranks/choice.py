"""Who agrees with whom: what the user said, or what the meshes of DTensors say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed

from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.loss_scale import LossScaleTensors
from mpcore.ranks.agreement import Agreement
from mpcore.ranks.ranks import Ranks


def check_ranks(ranks: object) -> Ranks | None:
    """Returns `ranks`; raises unless it is None or `Ranks` of a process group that is there."""
    if ranks is None:
        return None
    if not isinstance(ranks, Ranks):
        raise ArgumentTypeError(
            f"ranks: expected mpcore.Ranks(...) or None, got {type(ranks).__name__}. For all ranks "
            "pass mpcore.Ranks(), for those of a process group mpcore.Ranks(group)."
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError(
            "ranks: expected a process group, got none in this process. Call "
            "torch.distributed.init_process_group() before the optimizer is made, or leave ranks "
            "out in a process that trains alone."
        )
    return ranks


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def choose_agreement(
    ranks: Ranks | None, params: Sequence[Tensor], state: LossScaleTensors
) -> Agreement | None:
    """Returns what ranks agree by, None if there are no others to agree with.

    Args:
        ranks: What the user said; None: the ranks of the DTensors' meshes.
        params: All of the optimizer.
        state: The loss scale.
    """
    if ranks is None and several_ranks():
        meshes = {mesh: None for mesh in map(_mesh_of, params) if mesh is not None}
        if not any(mesh.size() > 1 for mesh in meshes):
            return None
        widest = max(meshes, key=lambda mesh: int(mesh.size()))
        ranks = Ranks(group=_group_of(widest))
    return None if ranks is None else Agreement(ranks, state)


def warn_alone() -> None:
    """Warns that nobody knows which of several ranks act as one."""
    warnings.warn(
        "this process is one of several ranks, and the optimizer was not told which of them act as "
        "one: if gradients overflow on one of them only, it alone skips the step, and "
        "clip_grad_norm_ knows its own norm. Pass ranks=mpcore.Ranks() to the optimizer. This is "
        "said once.",
        stacklevel=6,
    )


def _mesh_of(param: Any) -> Any:
    return getattr(param, "device_mesh", None)


def _group_of(mesh: Any) -> Any:
    """Returns the process group of all ranks of a mesh."""
    if mesh.size() == distributed.get_world_size():
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
