"""Who holds which parameters: copies of them count once, and have to be copies."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, distributed

from mpcore.base import are_same, held_here
from mpcore.errors import StageError
from mpcore.ranks.collective import gathered, naming_failures
from mpcore.ranks.ranks import Ranks
from mpcore.ranks.spread import holders_of, is_spread, pieces_of, pieces_of_ranks

_AT_ONCE = 2**22  # elements: bounds what a digest needs besides them
_ODD = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio in 64 bits, as a signed number


class Shares:
    """Knows which parameters this rank counts, once copies were compared.

    Args:
        ranks: What the user said.
        group: The process group of the step's collective; None: all ranks.
    """

    def __init__(self, ranks: Ranks, group: Any) -> None:
        self._ranks = ranks
        self._group = group
        self._params: list[Tensor] = []  # that were compared; keeps their ids valid
        self._counts: dict[int, bool] = {}  # by id of the parameter
        self._group_of: dict[int, Any] = {}  # who holds copies of it

    def know(self, params: Sequence[Tensor]) -> bool:
        """Whether these parameters were compared, and no others."""
        return are_same(params, self._params)

    def counts(self, param: Tensor) -> bool:
        """Whether this rank counts what it holds of a parameter."""
        return self._counts[id(param)]

    def are_copies(self, param: Tensor) -> bool:
        """Whether other ranks hold copies of a parameter."""
        return id(param) in self._group_of

    def group_of(self, param: Tensor) -> Any:
        """Returns the process group whose ranks hold copies of a parameter; None is all ranks."""
        return self._group_of[id(param)]

    def compare(
        self,
        params: Sequence[Tensor],
        name_of: Callable[[Tensor], str],
        value_of: Callable[[Tensor], Tensor],
    ) -> None:
        """Finds out who holds copies, and compares them; collective, syncs with the host.

        Args:
            params: All of the optimizer, in order.
            name_of: Their names.
            value_of: What must be equal where there are copies: masters.

        Raises:
            StageError: On all ranks of the group, if copies differ.
        """
        self._params, self._group_of = list(params), {}
        self._counts = {id(param): _is_first(param) for param in params}
        plain = [param for param in params if not hasattr(param, "device_mesh")]
        wrong = self._compare_spread(params, name_of, value_of)
        for group, held in self._holders(plain, name_of):
            names = list(map(name_of, held))
            layout = _crc(f"{name} {list(p.shape)}" for name, p in zip(names, held, strict=True))
            own = [layout, _digest([value_of(param) for param in held])]
            found = gathered(own, group, purpose=_purpose)
            others = len({each[0] for each in found}) > 1
            if self._ranks.replicas is None and others:
                continue  # stages of a pipeline: everybody has others
            if len(set(found)) > 1:
                bad = [rank for rank, each in enumerate(found) if each != found[0]]
                wrong = wrong or _message(names, len(found), bad, other_names=others)
            for param in held:
                self._counts[id(param)] = distributed.get_rank(group) == 0
                self._group_of[id(param)] = group
        # those whose own copies are equal must not wait for ever for the others
        told = gathered([bool(wrong)], self._group, purpose=_purpose)
        bad = [rank for rank, (is_bad,) in enumerate(told) if is_bad]
        if bad:
            self._params = []
            raise StageError(
                wrong
                or "step(): expected equal masters wherever ranks hold copies, got ranks "
                f"{bad} whose copies differ; their own messages tell of which parameters. Load or "
                "broadcast weights before the optimizer is made, on all ranks."
            )

    def _compare_spread(
        self,
        params: Sequence[Tensor],
        name_of: Callable[[Tensor], str],
        value_of: Callable[[Tensor], Tensor],
    ) -> str:
        """Finds out who holds which pieces of DTensors; returns what is wrong, or nothing."""
        spread = [param for param in params if is_spread(param, self._group)]
        counts = gathered([len(spread)], self._group, purpose=_purpose)
        if not any(count for (count,) in counts):
            return ""
        own = pieces_of(spread, name_of, lambda param: _digest([value_of(param)]))
        with naming_failures(self._group, _purpose):
            every = pieces_of_ranks(own, self._group)
        wrong = ""
        for param, holders in zip(
            spread, holders_of(every, self._group, self._ranks.replicas), strict=True
        ):
            first = min(holders)
            if first != distributed.get_rank(self._group):
                self._counts[id(param)] = False
            others = [rank for rank, digest in holders.items() if digest != holders[first]]
            if others:
                wrong = wrong or _message([name_of(param)], len(holders), others)
        return wrong

    def _holders(
        self, plain: Sequence[Tensor], name_of: Callable[[Tensor], str]
    ) -> list[tuple[Any, list[Tensor]]]:
        """Returns groups of ranks that hold copies, and what each holds."""
        replicas = self._ranks.replicas
        if not isinstance(replicas, Mapping):
            return [(self._group if replicas is None else replicas, list(plain))]
        held: dict[str | None, list[Tensor]] = {pattern: [] for pattern in [*replicas, None]}
        for param in plain:
            name = name_of(param)
            held[next((p for p in replicas if fnmatchcase(name, p)), None)].append(param)
        groups = {p: group for p, group in replicas.items() if group is not None}
        groups[None] = self._group
        return [(groups[p], each) for p, each in held.items() if p in groups]


def _purpose() -> str:
    return "the comparison of masters before the first step, or after a load"


def _is_first(param: Any) -> bool:
    """Whether no rank before this one holds the same elements of a DTensor; True of others."""
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        return True
    place = mesh.get_coordinate()
    copies = [at for at, spot in zip(place, param.placements, strict=True) if spot.is_replicate()]
    return not any(copies)


def _crc(lines: Any) -> int:
    return zlib.crc32("\n".join(lines).encode())


def _digest(tensors: Sequence[Tensor]) -> int:
    """Returns 64 bits of the bits of tensors; syncs with the host."""
    total = 0
    for tensor in map(held_here, tensors):
        size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        for part in torch.split(tensor.detach().reshape(-1).view(size), _AT_ONCE):
            places = torch.arange(1, len(part) + 1, device=part.device) * _ODD
            mixed = (part.long() + places) * _ODD
            mixed = (mixed ^ (mixed >> 29)) * _ODD  # not linear in the bits: no swap goes unseen
            total = (total * 31 + int((mixed ^ (mixed >> 32)).sum())) % 2**63
    return total


def _message(
    names: Sequence[str], count: int, others: Sequence[int], *, other_names: bool = False
) -> str:
    what = "list other parameters" if other_names else "have other values"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"step(): expected equal masters of {shown} on {count} ranks, got ranks "
        f"{list(others)} that {what} than the first. Load or broadcast weights before the "
        "optimizer is made, from one rank: DistributedDataParallel(model) first, then "
        "cast_model(model, dtype, optimizer). If ranks hold different parameters, say so: "
        'ranks=mpcore.Ranks(replicas={"*": None}).'
    )
