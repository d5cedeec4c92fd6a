"""How many updates a 16-bit weight would have lost: the reason for masters, on a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore._checks import SIXTEEN_BIT
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
        self._before = [
            (param, _sample(masters.of(param)).clone())
            for param in params
            if param.dtype in SIXTEEN_BIT and param.numel()
        ]

    @torch.no_grad()
    def lost(self, masters: Masters) -> float | None:
        """Returns the share of changed masters whose rounded weight stayed; None: none changed.

        A 16-bit weight that is updated itself starts from its rounded value: what it would become
        is the update added to that, rounded. Syncs with the host.
        """
        lost, moved = [], []
        for param, before in self._before:
            after = _sample(masters.of(param))
            weight = before.to(param.dtype)
            alone = (weight.float() + (after - before)).to(param.dtype)
            changed = after != before
            moved.append(changed.sum())
            lost.append((changed & (alone == weight)).sum())
        total = sum(int(count) for count in moved)
        return sum(int(count) for count in lost) / total if total else None


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]
