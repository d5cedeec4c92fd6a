"""Unscaled gradients of some parameters, for as long as a wrapped optimizer steps over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import laid_out_like
from mpcore.engine.gradient_buckets import Bucket
from mpcore.engine.gradients import StepGradients
from mpcore.masters import Masters


@contextmanager
def unscaled_copies(
    gradients: StepGradients, params: Sequence[Tensor], masters: Masters, backend: Backend
) -> Iterator[None]:
    """Gives masters of some parameters their unscaled gradients; no host sync.

    The gradients themselves stay as they are, for those who read them scaled: also those of
    float32 parameters, whose `p.grad` is a copy meanwhile.

    Args:
        gradients: Of a step, looked at and not unscaled: what overflows as it is unscaled is known.
        params: Some of theirs.
        masters: Where the masters are.
        backend: Unscales.
    """
    chosen = set(map(id, params))
    own: list[tuple[Tensor, Tensor | None]] = []
    try:
        for bucket in gradients.findings.buckets:
            _copy(bucket, chosen, gradients.coefficient, masters, backend, own)
        yield
    finally:
        for holder, grad in own:
            holder.grad = grad


@torch.no_grad()
def _copy(
    bucket: Bucket,
    chosen: set[int],
    coefficient: Tensor,
    masters: Masters,
    backend: Backend,
    own: list[tuple[Tensor, Tensor | None]],
) -> None:
    """Unscales on one device, and notes in `own` which gradient each holder had."""
    halves = [param for param in bucket.with_master if id(param) in chosen]
    others = [param for param in bucket.without if id(param) in chosen]
    targets = [*map(masters.of, halves), *others]
    if not targets:
        return
    here = coefficient.to(bucket.device, non_blocking=True)
    # which a backend fills, and the look has filled already
    flags = torch.zeros(len(targets), dtype=torch.int32, device=bucket.device)
    like = map(masters.layout_of, halves)
    copies = [torch.empty_like(one, dtype=torch.float32) for one in like]
    copies += map(torch.empty_like, others)
    pairs = [(param, param.grad) for param in (*halves, *others)]
    grads = [laid_out_like(c, g) for c, (_, g) in zip(copies, pairs, strict=True) if g is not None]
    first, rest = flags.tensor_split([len(halves)])
    backend.unscale_into(grads[: len(halves)], copies[: len(halves)], here, first)
    for copy, grad in zip(copies[len(halves) :], grads[len(halves) :], strict=True):
        copy.copy_(grad)
    backend.unscale_(copies[len(halves) :], here, rest)
    for holder, copy in zip(targets, copies, strict=True):
        own.append((holder, holder.grad))
        holder.grad = copy
