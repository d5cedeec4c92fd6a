"""`_sample.py` in C: the same numbers in one pass each, which allocates nothing but the sample."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mpcore.backends import _sample
from mpcore.backends._c_compiler import comes_built, passes
from mpcore.backends._c_work import DTYPES, run
from mpcore.base import GradientSet

#: Values that a median is taken of.
_OF_MEDIAN = 2**16


class _Sample(ctypes.Structure):
    """`sample_t` of `_sample.h`: what the threads of a pass share."""

    elements: int
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("next", "count")),
        *((name, ctypes.c_void_p) for name in ("taken", "masters", "before", "found")),
        ("dtype", ctypes.c_int32),
    ]


class MasterSample:
    """Some masters before a step: in C on a CPU, else in PyTorch; no host sync.

    Args:
        masters: Of one device, float32, at least one.
        most: Values of each, at most twice as many.
        dtype: Of the weights.

    Example:
        >>> master = torch.ones(2)
        >>> sample = MasterSample([master], 8, torch.bfloat16)
        >>> master += torch.tensor([1e-5, 1.0])
        >>> sample.lost([master])
        tensor([1, 2])
    """

    def __init__(self, masters: Sequence[Tensor], most: int, dtype: torch.dtype) -> None:
        self._most, self._dtype = most, dtype
        self._sizes = tuple(map(Tensor.numel, masters))
        _, self.count = _taken(self._sizes, most)  #: of the values that are looked at
        known = _for_c(masters)
        if known is None:
            self._before = _sample.sampled(masters, most)
            return
        self._before = torch.empty(self.count, dtype=torch.float32, device="cpu")
        self._run("take_sample", known, None)

    def lost(self, masters: Sequence[Tensor]) -> Tensor:
        """Returns how many updates would be lost, and masters changed: int64 `[2]`; no sync.

        Args:
            masters: As they are now.
        """
        known = _for_c(masters)
        if known is None or tuple(map(Tensor.numel, masters)) != self._sizes:
            return _sample.lost_updates(self._before, masters, self._most, self._dtype)
        found = torch.zeros(2, dtype=torch.int64, device="cpu")
        self._run("count_lost", known, found)
        return found

    def sizes_of_moves(self, masters: Sequence[Tensor]) -> tuple[float, float]:
        """Returns the largest change of a master, and the usual size of those that stood.

        Syncs; for readings in which hardly any moved.

        Args:
            masters: As they are now.

        Returns:
            The largest change, and the median of the magnitudes of masters that did not change: 0.0
            if there are none; of many, that of about 65,536 of them.
        """
        away = (_sample.sampled(masters, self._most) - self._before).abs()
        stood = self._before[away == 0]
        some = stood[:: _sample.step_of(len(stood), _OF_MEDIAN)].abs()
        usual = float(some.median()) if len(some) else 0.0
        return float(away.amax()), usual

    def _run(self, name: str, masters: GradientSet, found: Tensor | None) -> None:
        taken, count = _taken(self._sizes, self._most)
        work = _Sample()
        work.next, work.count = 0, len(taken)
        work.taken, work.masters = taken.data_ptr(), masters.pointers.buffer_info()[0]
        work.before = self._before.data_ptr()
        work.found = None if found is None else found.data_ptr()
        work.dtype, work.elements = DTYPES[self._dtype], count
        run(getattr(passes(), name), work)


def _for_c(masters: Sequence[Tensor]) -> GradientSet | None:
    """Returns masters whose samples C can take, contiguous; None if it cannot."""
    known = GradientSet.of(masters)
    if known.dtypes != {torch.float32} or known[0].device.type != "cpu":
        return None
    if not known.are_in_memory or not comes_built():
        return None
    if known.are_contiguous:
        return known
    return GradientSet.of(master.detach().reshape(-1) for master in masters)


@lru_cache(maxsize=16)  # of a model they are the same at every step
def _taken(sizes: tuple[int, ...], most: int) -> tuple[Tensor, int]:
    """Returns what is taken of each tensor, and how many values that are together.

    Of each tensor its number, stride, count, and place; int64 `[n, 4]`.

    Example:
        >>> _taken((9, 1), 4)
        (tensor([[0, 2, 5, 0],
                [1, 1, 1, 5]]), 6)
    """
    rows, place = [], 0
    for number, size in enumerate(sizes):
        stride = _sample.step_of(size, most)
        count = -(-size // stride)
        rows.append((number, stride, count, place))
        place += count
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), place
