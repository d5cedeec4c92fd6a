"""DTensors whose mesh has only some of the ranks that agree: other ranks may hold the same pieces.

With FSDP2 over one dimension of a mesh and tensor parallel layers over the other, what is not
parallelized lies on the first dimension alone: each rank of the second holds a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, distributed


class Piece(NamedTuple):
    """What a rank holds of a DTensor.

    Attributes:
        name: The parameter's.
        shape: Of the whole.
        place: Which piece of it: mesh shape, placements, coordinate in the mesh.
        digest: Of its values.
    """

    name: str
    shape: tuple[int, ...]
    place: str
    digest: int


def is_spread(param: Any, group: Any) -> bool:
    """Whether a parameter is a DTensor over some of the ranks of a group, but not all."""
    mesh = getattr(param, "device_mesh", None)
    return mesh is not None and mesh.size() < distributed.get_world_size(group)


def pieces_of(
    params: Sequence[Any], name_of: Callable[[Tensor], str], digest_of: Callable[[Tensor], int]
) -> list[Piece]:
    """Returns what this rank holds of each; syncs with the host."""
    found = []
    for param in params:
        mesh = param.device_mesh
        place = f"{tuple(mesh.shape)} {param.placements} {mesh.get_coordinate()}"
        found.append(Piece(name_of(param), tuple(param.shape), place, digest_of(param)))
    return found


def pieces_of_ranks(own: list[Piece], group: Any) -> list[list[Piece]]:
    """Returns the pieces of each rank of a group; collective."""
    every: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, own, group)
    return every


def holders_of(
    every: Sequence[Sequence[Piece]], group: Any, replicas: Any | Mapping[str, Any]
) -> list[dict[int, int]]:
    """Returns for each piece of this rank who holds it, and its digest there, this rank among them.

    Ranks that list other parameters hold none, like stages of a pipeline.

    Args:
        every: The pieces of each rank of the group.
        group: Those that agree; None: all ranks.
        replicas: As for `mpcore.Ranks`.
    """
    here = distributed.get_rank(group)
    lists = [[(piece.name, piece.shape) for piece in pieces] for pieces in every]
    alike = [rank for rank, listed in enumerate(lists) if listed == lists[here]]
    found = []
    for index, piece in enumerate(every[here]):
        allowed = _allowed(piece.name, group, replicas)
        there = {rank: every[rank][index] for rank in alike if rank == here or rank in allowed}
        found.append({rank: p.digest for rank, p in there.items() if p.place == piece.place})
    return found


def _allowed(name: str, group: Any, replicas: Any | Mapping[str, Any]) -> set[int]:
    """Returns the ranks, as the group counts them, that may hold copies of a parameter."""
    members = distributed.get_process_group_ranks(group)
    held_by: Any = replicas
    if isinstance(replicas, Mapping):
        pattern = next((p for p in replicas if fnmatchcase(name, p)), None)
        if pattern is not None and replicas[pattern] is None:
            return set()
        held_by = None if pattern is None else replicas[pattern]
    if held_by is None:
        return set(range(len(members)))
    copies = set(distributed.get_process_group_ranks(held_by))
    return {rank for rank, member in enumerate(members) if member in copies}
