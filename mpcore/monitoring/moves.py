"""What became of weights by a reading: which moved, were updates lost, are all finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpcore.base import held_here
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.monitoring.update_sample import UpdateSample

#: A parameter this much smaller than the largest one, by the root of its mean square, does not say
#: that training goes on when it moves: a bias that is 0 is moved by any update. In 32 steps an
#: update of half a last place of the largest weights comes to it.
_SMALL = 2.0**-20


class Moves(NamedTuple):
    """What became of weights.

    Attributes:
        lost: See `Reading.lost_updates`.
        moved: Masters of the sample that changed, of parameters that are not tiny beside others;
            None: there is no sample of all parameters.
        bad: Names of weights that are not finite.
    """

    lost: float | None
    moved: int | None
    bad: Sequence[str]


def moves_of(
    sample: UpdateSample,
    optimizer: MixedPrecisionOptimizer,
    name_of: Callable[[Tensor], str],
) -> Moves:
    """Returns what became of weights since a sample was taken; syncs once for each device.

    Each weight is read once, by the pass that looks at gradients.
    """
    lost = sample.lost(optimizer._masters)
    params = [param for param in optimizer._params() if param.dtype != torch.float64]
    kinds, sizes = _looked_at(params, optimizer)
    bad = [name_of(param) for param, kind in zip(params, kinds, strict=True) if kind]
    size_of = dict(zip(map(id, params), sizes, strict=True))
    least = max((size for size in sizes if math.isfinite(size)), default=0.0) * _SMALL
    earnest = (count for param, count in sample.moved if not size_of[id(param)] < least)
    return Moves(lost, sum(earnest) if sample.is_of_all else None, bad)


@torch.no_grad()
def _looked_at(
    params: Sequence[Tensor], optimizer: MixedPrecisionOptimizer
) -> tuple[list[float], list[float]]:
    """Returns of each weight what is not finite in it, and the root of its mean square."""
    here = [held_here(param.detach()) for param in params]
    kinds, sizes = [0.0] * len(params), [0.0] * len(params)
    for device in dict.fromkeys(weight.device for weight in here):
        places = [place for place, weight in enumerate(here) if weight.device == device]
        one = torch.ones((), dtype=torch.float32, device=device)
        found = optimizer._stage._backend.inspect([here[place] for place in places], one, None)
        rows = torch.stack([found.kinds.double(), found.square_sum]).tolist()
        for place, kind, square_sum in zip(places, *rows, strict=True):
            kinds[place] = kind
            sizes[place] = math.sqrt(square_sum / max(here[place].numel(), 1))
    return kinds, sizes
