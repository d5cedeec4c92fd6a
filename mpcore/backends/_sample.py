"""A sample of masters, and how many of their updates a 16-bit weight would lose, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def step_of(numel: int, most: int) -> int:
    """Returns every how-many-th element is taken, so that about `most` are, evenly spaced.

    Example:
        >>> step_of(4096, 4096), step_of(9000, 4096), step_of(0, 4096)
        (1, 2, 1)
    """
    return max(1, numel // most)


@torch.no_grad()
def sampled(masters: Sequence[Tensor], most: int) -> Tensor:
    """Returns some values of each tensor in one; no host sync.

    Args:
        masters: Of one device, float32, at least one.
        most: Values of each, at most twice as many.

    Example:
        >>> sampled([torch.arange(4.0), torch.ones(1)], 2)
        tensor([0., 2., 1.])
    """
    flat = [master.detach().reshape(-1) for master in masters]
    return torch.cat([master[:: step_of(master.numel(), most)] for master in flat])


@torch.no_grad()
def lost_updates(
    before: Tensor, masters: Sequence[Tensor], most: int, dtype: torch.dtype
) -> Tensor:
    """Returns how many updates 16-bit weights would lose, and how many masters changed; no sync.

    A 16-bit weight that is updated itself starts from its rounded value: what it would become is
    the update added to that, rounded.

    Args:
        before: What `sampled` returned before the updates.
        masters: As they are now.
        most: As then.
        dtype: Of the weights.

    Returns:
        int64 `[2]`.

    Example:
        >>> master = torch.ones(2)
        >>> before = sampled([master], 8)
        >>> master += torch.tensor([1e-5, 1.0])
        >>> lost_updates(before, [master], 8, torch.float16)
        tensor([1, 2])
    """
    after = sampled(masters, most)
    weight = before.to(dtype)
    alone = (weight.float() + (after - before)).to(dtype)
    changed = after != before
    return torch.stack([(changed & (alone == weight)).sum(), changed.sum()])
