"""Masters beside the weights that they round to: which differ, and making one the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpcore.backends import Backend, differing
from mpcore.base import held_here
from mpcore.masters.masters import Masters


@torch.no_grad()
def take_weights(masters: Masters, *, exact: bool) -> None:
    """Makes weights the masters, whatever they are; no host sync.

    Args:
        masters: To be overwritten.
        exact: Whether masters lose what the weights do not have, too. Otherwise elements that are
            their rounded masters stay.
    """
    for param, master in masters.items():
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
    for param, value in pairs:
        master = masters.of(param)
        master.copy_(value)
        zero = torch.zeros((), dtype=torch.int32, device=param.device)
        backend.cast_into([master], [param.detach()], zero, zero.long())
        masters.note([param])


def stale_weights(masters: Masters, params: Iterable[Tensor] | None = None) -> list[Tensor]:
    """Returns the weights that are not their rounded masters; syncs with the host.

    Args:
        masters: Of the weights.
        params: Those to look at; all by default.
    """
    asked = [param for param, _ in masters.items()] if params is None else params
    return [param for param in asked if bool(_changed(param, masters.of(param)).any())]


def _changed(param: Tensor, master: Tensor) -> Tensor:
    """Returns which elements here are not their rounded masters; no host sync."""
    return differing(held_here(param.detach()), held_here(master))
