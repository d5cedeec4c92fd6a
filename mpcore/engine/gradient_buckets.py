"""The gradients of one device, and what is known about them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends import Inspection
from mpcore.base import SIXTEEN_BIT, ParameterSet, grads_of, held_here


@torch.no_grad()
def tensor_norms(grads: Sequence[Tensor], coefficient: Tensor) -> Tensor:
    """Returns the 2-norm of every `grad * coefficient`, computed in float64; no host sync.

    For float64 gradients, which no backend inspects; their squares overflow above 1e154.

    Args:
        grads: Gradients of one device, any shape and floating dtype.
        coefficient: 0-d float32.

    Returns:
        float64 of length `len(grads)`.
    """
    wide = torch.float32
    return torch.stack(
        [
            torch.linalg.vector_norm(
                g.to(torch.promote_types(g.dtype, wide)) * coefficient, dtype=torch.float64
            )
            for g in grads
        ]
    )


@dataclass(frozen=True)
class Look:
    """What an inspection found, for those who watch.

    Attributes:
        params: The parameters, in its order.
        shapes: Theirs.
        layouts: Dtype and strides of each gradient.
        found: The rest.
    """

    params: tuple[Tensor, ...]
    shapes: Sequence[torch.Size]
    layouts: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    found: Inspection


@dataclass
class Bucket:
    """The parameters of one device that have a gradient: those with a master first."""

    device: torch.device
    with_master: Sequence[Tensor]
    without: Sequence[Tensor]
    nonfinite: Tensor | None = None  # int32, non-zero flags overflow, in the order of `params`
    largest: Tensor | None = None  # float32, magnitudes of unscaled gradients, if they were seen
    found: Look | None = None  # the first look at them, if somebody watches

    @property
    def params(self) -> Sequence[Tensor]:
        """All of them, in the order of flags."""
        return [*self.with_master, *self.without] if self.without else self.with_master

    def own_flags(self) -> Tensor:
        """Returns flags that may be written to: those of an inspection belong to it."""
        if self.nonfinite is None:
            size = len(self.with_master) + len(self.without)
            self.nonfinite = torch.zeros(size, dtype=torch.int32, device=self.device)
        return self.nonfinite

    def keep(self, params: Collection[Tensor], flag_of: Mapping[Tensor, Tensor]) -> None:
        """Leaves out parameters that are not among these, and knows the flags of the others."""
        self.with_master = [param for param in self.with_master if param in params]
        self.without = [param for param in self.without if param in params]
        flags = [flag_of[param] for param in self.params]
        self.nonfinite = torch.stack(flags) if flags else None
        self.largest = None

    def add_flags(self, flags: Tensor) -> None:
        """Joins flags with those that are there."""
        self.nonfinite = flags if self.nonfinite is None else self.nonfinite | flags


def buckets_of(params: ParameterSet) -> list[Bucket]:
    """Returns a bucket of each device, in order of appearance; no host sync."""
    buckets = []
    for device in params.devices:
        one = len(params.devices) == 1
        here = params if one else ParameterSet(p for p in params if p.device == device)
        if here.dtypes.issubset(SIXTEEN_BIT):
            buckets.append(Bucket(device, here, []))
            continue
        halves = [p for p in here if p.dtype in SIXTEEN_BIT]
        buckets.append(Bucket(device, halves, [p for p in here if p.dtype not in SIXTEEN_BIT]))
    return buckets


def any_flag(buckets: Sequence[Bucket], found_before: Tensor | None, home: torch.device) -> Tensor:
    """Returns 0-d int32, not 0 if anything was found to overflow; no host sync.

    Args:
        buckets: With flags of their own.
        found_before: What was found besides these: 0-d, non-zero means overflow.
        home: The device of the result.
    """
    flags = [bucket.own_flags() for bucket in buckets]
    found = [(f != 0).any().int().to(home, non_blocking=True) for f in flags]
    if found_before is not None:
        found.append((found_before != 0).int().reshape(()).to(home, non_blocking=True))
    if not found:
        return torch.zeros((), dtype=torch.int32, device=home)
    return torch.stack(found).amax() if len(found) > 1 else found[0]


def largest_of(buckets: Sequence[Bucket], unscaled_by: Tensor) -> Tensor:
    """Returns the largest magnitude of float16 gradients, unscaled, 0-d float64; no host sync.

    0 if there are none, anything if one is not finite.
    """
    home = unscaled_by.device
    peaks = [torch.zeros((), dtype=torch.float64, device=home)]
    for bucket in buckets:
        grads = grads_of(p for p in bucket.with_master if p.dtype == torch.float16)
        if grads and bucket.largest is not None and len(grads) == len(bucket.with_master):
            peak = bucket.largest[: len(grads)].amax().double()
            peaks.append(peak.to(home, non_blocking=True))
        elif grads := [here for here in map(held_here, grads) if here.numel()]:
            norms = torch.stack(torch._foreach_norm(grads, torch.inf)).amax().double()
            peaks.append(norms.to(home, non_blocking=True) * unscaled_by)
    return torch.stack(peaks).amax()
