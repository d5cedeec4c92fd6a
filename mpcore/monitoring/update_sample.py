"""How many updates a 16-bit weight would have lost: the reason for masters, on a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.base import SIXTEEN_BIT, held_here
from mpcore.masters import Masters

#: Masters that are looked at, of each parameter; evenly spaced.
SAMPLE = 4096


class UpdateSample:
    """Some masters of each 16-bit parameter before a step. No host sync.

    Args:
        params: Parameters that have a gradient; those with a master are looked at.
        masters: Where the masters are.
    """

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], masters: Masters) -> None:
        self._params: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            if param.dtype in SIXTEEN_BIT and held_here(masters.of(param)).numel():
                self._params.setdefault((param.device, param.dtype), []).append(param)
        self._before = {key: _samples(some, masters) for key, some in self._params.items()}

    @torch.no_grad()
    def lost(self, masters: Masters) -> float | None:
        """Returns the share of changed masters whose rounded weight stayed; None: none changed.

        A 16-bit weight that is updated itself starts from its rounded value: what it would become
        is the update added to that, rounded. Syncs with the host, once for each device.
        """
        counts: dict[torch.device, list[Tensor]] = {}
        for (device, dtype), before in self._before.items():
            after = _samples(self._params[device, dtype], masters)
            weight = before.to(dtype)
            alone = (weight.float() + (after - before)).to(dtype)
            changed = after != before
            counts.setdefault(device, []).append(
                torch.stack([(changed & (alone == weight)).sum(), changed.sum()])
            )
        read = [torch.stack(some).sum(0).tolist() for some in counts.values()]
        lost, moved = sum(one[0] for one in read), sum(one[1] for one in read)
        return lost / moved if moved else None


def _samples(params: Sequence[Tensor], masters: Masters) -> Tensor:
    """Returns some of the masters of parameters, as far as this rank holds them, in one tensor."""
    flat = [held_here(masters.of(param).detach()).reshape(-1) for param in params]
    return torch.cat([master[:: max(1, master.numel() // SAMPLE)] for master in flat])
