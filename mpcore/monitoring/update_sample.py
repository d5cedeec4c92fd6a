"""How a step moved the masters, on a sample; and whether the weights are finite after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore.backends import Backend, MasterSample
from mpcore.base import SIXTEEN_BIT, held_here
from mpcore.masters import Masters

#: Values of masters that are looked at, of each parameter; evenly spaced.
SAMPLE = 4096
#: Of all parameters of a device and format together, about; but 64 of each.
TOGETHER = 2**20
#: An update below this share of a float32 number is rounded away.
_LOST = 2.0**-25

_Kind = tuple[torch.device, torch.dtype]


class Moves(NamedTuple):
    """How a step moved the masters.

    Attributes:
        lost: Share of changed masters whose rounded weight stayed; None: none changed.
        usual: Whether a usual master moved; None: there are parameters without a master. If half of
            them or more did, it did; if fewer, a change is larger than what a usual one of those
            that stood rounds away. Biases that are 0 are moved by any update.
        finite: Whether the weights are.
    """

    lost: float | None
    usual: bool | None
    finite: bool


class UpdateSample:
    """Some masters of each 16-bit parameter before a step. No host sync.

    Args:
        params: Parameters that have a gradient; those with a master are looked at.
        masters: Where the masters are.
    """

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], masters: Masters) -> None:
        # a weight without a master loses none on average: it is rounded at random
        randomly = masters.held.store == "none"
        self._is_of_all = not randomly and all(param.dtype in SIXTEEN_BIT for param in params)
        self._params: dict[_Kind, Sequence[Tensor]] = {}
        self._before: dict[_Kind, MasterSample] = {}
        kinds = [(param.device, param.dtype) for param in params]
        for key in dict.fromkeys(kind for kind in kinds if kind[1] in SIXTEEN_BIT):
            some = list(compress(params, [kind == key for kind in kinds]))
            held = _held(some, masters)
            sizes = list(map(Tensor.numel, held))
            if any(sizes):
                self._params[key] = list(compress(some, sizes))
                if randomly:
                    continue
                most = min(SAMPLE, max(64, TOGETHER // len(some)))
                self._before[key] = MasterSample(list(compress(held, sizes)), most, key[1])

    @torch.no_grad()
    def moves(self, masters: Masters, backend: Backend) -> Moves:
        """Returns how the step moved the masters, and whether their weights are finite.

        A 16-bit weight that is updated itself starts from its rounded value: what it would become
        is the update added to that, rounded. Syncs with the host, once for each device; more often
        if fewer than half of the masters changed.

        Args:
            masters: Where the masters are.
            backend: Looks at the weights.
        """
        now = {key: _held(self._params[key], masters) for key in self._before}
        counts: dict[torch.device, list[Tensor]] = {}
        for key, params in self._params.items():
            weights = list(map(held_here, params))
            one = torch.ones((), dtype=torch.float32, device=key[0])
            bad = backend.inspect(weights, one, None).found_inf.reshape(1).long()
            before = self._before.get(key)
            moves = torch.zeros_like(bad).expand(2) if before is None else before.lost(now[key])
            counts.setdefault(key[0], []).append(torch.cat([moves, bad]))
        read = [torch.stack(some).sum(0).tolist() for some in counts.values()]
        lost, moved, bad = (sum(one[i] for one in read) for i in range(3))
        return Moves(
            lost / moved if moved else None,
            self._moved_usual(now, moved) if self._is_of_all else None,
            not bad,
        )

    def _moved_usual(self, now: dict[_Kind, list[Tensor]], moved: int) -> bool:
        if not moved or 2 * moved >= sum(before.count for before in self._before.values()):
            return moved > 0
        sizes = [before.sizes_of_moves(now[key]) for key, before in self._before.items()]
        usual = [stood for _, stood in sizes if stood]
        # what is NaN is no update that was lost
        return not usual or not max(most for most, _ in sizes) < _LOST * min(usual)


def _held(params: Sequence[Tensor], masters: Masters) -> list[Tensor]:
    """Returns the masters of parameters, as far as this rank holds them.

    Those that lie packed in memory are decoded for the time of a reading.
    """
    return [held_here(masters.value_of(param)) for param in params]
