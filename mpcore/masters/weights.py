"""Masters beside the weights that they round to: which differ, and making one the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpcore.backends import Backend, differing
from mpcore.base import held_here
from mpcore.masters.masters import Masters
from mpcore.stores import split


@torch.no_grad()
def take_weights(masters: Masters, *, exact: bool) -> None:
    """Makes weights the masters, whatever they are; no host sync.

    Args:
        masters: To be overwritten.
        exact: Whether masters lose what the weights do not have, too. Otherwise elements that are
            their rounded masters stay.
    """
    for param, master in masters.items():
        if not masters.held.is_whole(param):
            beside = masters.held.lies_in(param, master)
            if exact and beside is not param:
                held_here(beside).zero_()
            continue
        held = held_here(master)
        value = held_here(param.detach()).to(held.dtype)
        held.copy_(value if exact else torch.where(_changed(param, master), value, held))
    masters.note_weights()


@torch.no_grad()
def overwrite(masters: Masters, pairs: Iterable[tuple[Tensor, Tensor]], backend: Backend) -> None:
    """Overwrites masters with values, and their weights with these rounded; no host sync.

    Args:
        masters: To be overwritten.
        pairs: (parameter, value of its master).
        backend: Rounds.
    """
    packed = []
    for param, value in pairs:
        master = masters.of(param)
        if masters.held.is_whole(param):
            packed.append(param)
        zero = torch.zeros((), dtype=torch.int32, device=param.device)
        with masters.decoded([param]):
            master.copy_(value)
            masters.held.write([(param, master)], backend, zero, zero.long())
        masters.note([param])
    masters.note_packed(packed)


def stale_weights(masters: Masters, params: Iterable[Tensor] | None = None) -> list[Tensor]:
    """Returns the weights that are not their rounded masters; syncs with the host.

    A weight that is a part of its master is always right.

    Args:
        masters: Of the weights.
        params: Those to look at; all by default.
    """
    asked = [param for param, _ in masters.items()] if params is None else params
    whole = filter(masters.held.is_whole, asked)
    return [param for param in whole if bool(_changed(param, masters.of(param)).any())]


def adopt_whole(param: Tensor, master: Tensor, counts: Tensor) -> None:
    """Makes elements of a weight that are no rounding of a whole master the master; no host sync.

    As `adopt_` of the backends, for a weight that any store may have rounded.

    Args:
        param: float16 or bfloat16. Left as it is.
        master: float32.
        counts: int64 `[2]`: elements that became masters, and that were not finite, are added.
    """
    weight, held = held_here(param.detach()), held_here(master.detach())
    changed, finite = _changed(param, master), weight.isfinite()
    torch.where(changed & finite, weight.float(), held, out=held)
    counts.add_(torch.stack([(changed & finite).sum(), (changed & finite.logical_not()).sum()]))


@torch.no_grad()
def round_ties(param: Tensor, master: Tensor) -> None:
    """Rounds ties of a master to even where its weight has them as a split one does; no host sync.

    Args:
        param: float16 or bfloat16. Elements that are no rounding of the master stay.
        master: float32.
    """
    weight, held = held_here(param.detach()), held_here(master.detach())
    ties = differing(weight, held) & _changed(param, master).logical_not()
    torch.where(ties, held.to(weight.dtype), weight, out=weight)


def _changed(param: Tensor, master: Tensor) -> Tensor:
    """Returns which elements here are not their rounded masters; no host sync.

    A split master of bfloat16 rounds ties away from zero, any other one to even: one that comes
    from a checkpoint fits a weight of either.
    """
    weight, held = held_here(param.detach()), held_here(master.detach())
    changed = differing(weight, held)
    if weight.dtype == torch.bfloat16:
        changed &= split(held, weight.dtype)[0] != weight
    return changed
