"""How many updates a 16-bit weight would have lost: the reason for masters, on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from mpcore.backends import MasterSample
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
        #: a weight without a master loses none on average: it is rounded at random
        self._rounds_randomly = masters.held.store == "none"
        #: whether there is a master of each parameter
        self.is_of_all = not self._rounds_randomly and all(p.dtype in SIXTEEN_BIT for p in params)
        #: masters that have changed, as far as `lost` has looked
        self.moved = 0
        self._params: dict[tuple[torch.device, torch.dtype], Sequence[Tensor]] = {}
        self._before: dict[tuple[torch.device, torch.dtype], MasterSample] = {}
        if self._rounds_randomly:
            return
        kinds = [(param.device, param.dtype) for param in params]
        for key in dict.fromkeys(kind for kind in kinds if kind[1] in SIXTEEN_BIT):
            some = list(compress(params, [kind == key for kind in kinds]))
            held = _held(some, masters)
            sizes = list(map(Tensor.numel, held))
            if any(sizes):
                self._params[key] = list(compress(some, sizes))
                self._before[key] = MasterSample(list(compress(held, sizes)), SAMPLE, key[1])

    @torch.no_grad()
    def lost(self, masters: Masters) -> float | None:
        """Returns the share of changed masters whose rounded weight stayed; None: none changed.

        None as well with `masters="none"`.

        A 16-bit weight that is updated itself starts from its rounded value: what it would become
        is the update added to that, rounded. Syncs with the host, once for each device.
        """
        counts: dict[torch.device, list[Tensor]] = {}
        for (device, dtype), before in self._before.items():
            held = _held(self._params[device, dtype], masters)
            counts.setdefault(device, []).append(before.lost(held))
        read = [torch.stack(some).sum(0).tolist() for some in counts.values()]
        lost, moved = sum(one[0] for one in read), sum(one[1] for one in read)
        self.moved = moved
        return lost / moved if moved else None


def _held(params: Sequence[Tensor], masters: Masters) -> list[Tensor]:
    """Returns the masters of parameters, as far as this rank holds them.

    Those that lie packed in memory are decoded for the time of a reading.
    """
    return [held_here(masters.value_of(param).detach()) for param in params]
