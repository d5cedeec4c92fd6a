"""What is wrong with a model's tensors; asked when a step was skipped, so syncs are fine.

Of DTensors it is asked what this rank holds: an operation over all is collective, and other ranks
may have no monitor, or look at another time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mpcore.base import held_here

#: BatchNorm's: whatever they were at first, they have to be finite
_STATISTICS = ("running_mean", "running_var")
#: formats that have an infinity and that `isposinf` knows
_FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of floating tensors that hold a value that is not finite; syncs.

    Example:
        >>> not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, torch.nan]))])
        ['b']
    """
    return [
        name
        for name, t in named
        if t.is_floating_point() and not bool(torch.isfinite(held_here(t)).all())
    ]


@torch.no_grad()
def large_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of float16 tensors with a magnitude of 2^15 or more; syncs.

    65504 is the largest; nothing that a model learns comes near it by accident.

    Example:
        >>> large_weights([("a", torch.ones(2).half()), ("b", torch.full((2,), 4e4).half())])
        ['b']
    """
    return [
        name
        for name, t in ((name, held_here(t)) for name, t in named)
        if t.dtype == torch.float16 and t.numel() and bool(t.abs().amax() >= 2.0**15)
    ]


class BufferWatch:
    """Tells which buffers of a model have been damaged since it was made.

    Many a mask is -inf by intention. So a buffer is damaged if it holds a kind of value (NaN, inf,
    -inf) that it did not hold at first; if it came later or has another shape, NaN alone counts.
    -inf among nothing but 0 is a mask, whenever it was made. Running statistics have to be finite.

    Making one does not sync.

    Args:
        model: Whose buffers; None has none.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        >>> watch = BufferWatch(model)
        >>> watch.damaged()
        []
        >>> model.running_mean[0] = model.mask[0] = torch.nan
        >>> watch.damaged()
        ['running_mean', 'mask']
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._first = {name: (t.shape, _kinds(t)) for name, t in self._named()}

    def damaged(self) -> list[str]:
        """Returns the names of damaged buffers; syncs."""
        return [name for name, t in self._named() if self._is_damaged(name, t)]

    def _named(self) -> list[tuple[str, Tensor]]:
        named = () if self._model is None else self._model.named_buffers()
        return [
            (name, held_here(t.detach()))
            for name, t in named
            if t.dtype in _FORMATS and t.layout == torch.strided
        ]

    def _is_damaged(self, name: str, t: Tensor) -> bool:
        now = _kinds(t).tolist()
        if not any(now) or name.rpartition(".")[2] in _STATISTICS:
            return any(now)
        if bool((t.isneginf() | (t == 0)).all()):
            return False
        shape, first = self._first.get(name, (None, None))
        then = [False, True, True] if first is None or shape != t.shape else first.tolist()
        return any(new and not old for new, old in zip(now, then, strict=True))


def _kinds(t: Tensor) -> Tensor:
    """Returns whether there is a NaN, an inf, a -inf; no host sync."""
    return torch.stack([t.isnan().any(), t.isposinf().any(), t.isneginf().any()])
