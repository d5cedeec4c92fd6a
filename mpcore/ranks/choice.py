"""Who agrees with whom: what the user said, or what the meshes of DTensors say."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.loss_scale import LossScaleTensors
from mpcore.ranks.agreement import Agreement
from mpcore.ranks.collective import gathered
from mpcore.ranks.ranks import Ranks


def latest_of(is_latest: bool, group: Any) -> int:
    """Returns the last of the ranks of a group for which something is so; collective, syncs."""
    told = gathered([is_latest], group, purpose=lambda: "the end of a Join")
    return max(rank for rank, (so,) in enumerate(told) if so)


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
    groups = ranks.replicas.values() if isinstance(ranks.replicas, Mapping) else [ranks.replicas]
    for name, group in [("group", ranks.group), *(("replicas", each) for each in groups)]:
        if group is not None and not isinstance(group, distributed.ProcessGroup):
            raise ArgumentTypeError(
                f"ranks: expected a torch.distributed.ProcessGroup or None for {name}, got "
                f"{type(group).__name__}. torch.distributed.new_group([0, 1]) makes one; that of a "
                "mesh is mesh.get_group()."
            )
        if group is not None and distributed.get_rank(group) < 0:
            raise ArgumentError(
                f"ranks: expected a {name} that this rank is in, got one of other ranks. Pass the "
                "group of this rank."
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
    meshes = [mesh for mesh in meshes_of(params) if mesh.size() > 1]
    if ranks is None and not (meshes and several_ranks()):
        return None
    if ranks is not None and meshes:
        _check_holds(ranks, meshes)
    if ranks is None:
        # ranks of several meshes are tied to each other by the parameters of each: all are asked
        widest = widest_of(meshes)
        ranks = Ranks(group=None if widest is None else group_of(widest))
    return Agreement(ranks, state)


def find_replicated(params: Sequence[Tensor]) -> Ranks | None:
    """Returns the ranks of the DistributedDataParallel module that holds parameters, if one does.

    Nothing leads from a parameter to it, so that all objects are gone through: once.

    Args:
        params: Some.
    """
    known = set(map(id, params))
    for each in gc.get_objects():
        if type(each) is DistributedDataParallel and not known.isdisjoint(
            map(id, each.module.parameters())
        ):
            whole = each.process_group is distributed.group.WORLD
            return Ranks(None if whole else each.process_group)
    return None


def warn_alone() -> None:
    """Warns that nobody knows which of several ranks act as one."""
    warnings.warn(
        "this process is one of several ranks, and the optimizer was not told which of them act as "
        "one: if gradients overflow on one of them only, it alone skips the step, and "
        "clip_grad_norm_ knows its own norm. Pass ranks=mpcore.Ranks() to the optimizer. This is "
        "said once.",
        stacklevel=6,
    )


def warn_scaler() -> None:
    """Warns that an outside scaler decides, whatever ranks the optimizer was told of."""
    warnings.warn(
        "a GradScaler drives the step of an optimizer that has ranks=: it decides alone which "
        "ranks skip, and the optimizer asks no rank. Leave ranks= out and pass process_group= to "
        "mpcore.GradScaler, or leave the scaler out: optimizer.backward(loss). This is said once.",
        stacklevel=6,
    )


def meshes_of(params: Iterable[Any]) -> list[Any]:
    """Returns the meshes of the DTensors among parameters, each once, in order of appearance."""
    found = (getattr(param, "device_mesh", None) for param in params)
    return list(dict.fromkeys(mesh for mesh in found if mesh is not None))


def _check_holds(ranks: Ranks, meshes: Sequence[Any]) -> None:
    """Raises unless ranks that agree have all pieces of the DTensors that they hold."""
    group = set(distributed.get_process_group_ranks(ranks.group))
    for mesh in meshes:
        outside = sorted(set(mesh.mesh.flatten().tolist()) - group)
        if outside:
            raise ArgumentError(
                f"ranks: expected a group of all ranks of the DTensors' mesh, got one without "
                f"{outside}, which hold other pieces or copies of them. Leave ranks out, or pass "
                "a group that has the ranks of the mesh."
            )


def widest_of(meshes: Sequence[Any]) -> Any:
    """Returns the mesh that has the ranks of all others, None if none has."""
    every = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    widest = max(range(len(meshes)), key=lambda index: len(every[index]))
    return meshes[widest] if all(every[widest] >= each for each in every) else None


def group_of(mesh: Any) -> Any:
    """Returns the process group of all ranks of a mesh, None for all there are."""
    if mesh.size() == distributed.get_world_size():
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
