"""A backend's passes over what this rank holds of tensors that may have no memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend, Inspection, ScaleMove, cpu, reference
from mpcore.base import all_in_memory, held_here, laid_out_like
from mpcore.errors import ArgumentError
from mpcore.updates import Batch, Hyper


class WrappedPasses:
    """A backend's passes over tensors that may have no memory of their own.

    Of a DTensor they see what this rank holds. Other wrappers are computed with torch's operations,
    and never updated: their step is not fused.

    Args:
        backend: Does the passes over tensors in memory.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def prepares_on_the_way(self) -> bool:
        """Whether a launch is saved where `inspect` prepares the plan of the update to come."""
        return self._backend.prepares_on_the_way

    def _for(self, *lists: Sequence[Tensor], device: torch.device) -> Backend:
        if all(map(all_in_memory, lists)):
            return self._backend
        # both by torch's operations, with the same bits of unscaled gradients and of weights
        return cpu if device.type == "cpu" else reference

    def unscale_(self, grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
        """Multiplies in place and flags."""
        here = list(map(held_here, grads))
        self._for(here, device=coefficient.device).unscale_(here, coefficient, nonfinite)

    def unscale_into(
        self,
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        coefficient: Tensor,
        nonfinite: Tensor,
    ) -> None:
        """Multiplies into float32 tensors and flags."""
        held = list(map(held_here, outs))
        here = _laid_out_like(held, grads)
        module = self._for(here, held, device=coefficient.device)
        module.unscale_into(here, held, coefficient, nonfinite)

    def cast_into(
        self,
        masters: Sequence[Tensor],
        weights: Sequence[Tensor],
        found_inf: Tensor,
        saturated: Tensor,
    ) -> None:
        """Rounds masters into 16-bit weights unless `found_inf` is set."""
        held, here = list(map(held_here, masters)), list(map(held_here, weights))
        module = self._for(held, here, device=found_inf.device)
        if any(m.stride() != w.stride() for m, w in zip(held, here, strict=True)):
            module = reference  # which goes by elements, not by memory
        module.cast_into(held, here, found_inf, saturated)

    def adopt_(self, weights: Sequence[Tensor], masters: Sequence[Tensor], counts: Tensor) -> None:
        """Makes weights that are not their rounded masters the masters, by element."""
        here, held = list(map(held_here, weights)), list(map(held_here, masters))
        self._for(here, held, device=counts.device).adopt_(here, held, counts)

    def inspect(
        self, grads: Sequence[Tensor], coefficient: Tensor, max_norm: float | None, **options: Any
    ) -> Inspection:
        """Finds overflow, norms and the clip.

        Raises:
            ArgumentError: A clip of tensors of which other ranks hold parts.
        """
        if max_norm is not None and any(map(_is_shared, grads)):
            raise ArgumentError(
                "clip_grad_norm_(): expected gradients that this rank holds whole, got a DTensor "
                "over several ranks, whose norm nobody is asked for under a GradScaler. Call "
                "scaler.unscale_(optimizer) and torch.nn.utils.clip_grad_norm_."
            )
        here = list(map(held_here, grads))
        module = self._for(here, device=coefficient.device)
        return module.inspect(here, coefficient, max_norm, **options)

    def plan_update(self, rule: str, batches: Sequence[Batch]) -> Any:
        """Returns what `update_` needs to know about what this rank holds."""
        return self._backend.plan_update(rule, list(map(_held, batches)))

    def prepare_(self, plan: Any, hyper: Hyper) -> None:
        """Computes the scalars of a plan's next update."""
        self._backend.prepare_(plan, hyper)

    def update_(
        self,
        plan: Any,
        grads: Sequence[Sequence[Tensor]],
        coefficient: Tensor,
        found_inf: Tensor,
        saturated: Tensor,
        then: ScaleMove | None = None,
        edits: Tensor | None = None,
    ) -> None:
        """Updates masters, moments and weights unless `found_inf` is set; then moves the scale."""
        batches: Sequence[Batch] = plan.batches
        here = [_laid_out_like(b.masters, g) for b, g in zip(batches, grads, strict=True)]
        self._backend.update_(plan, here, coefficient, found_inf, saturated, then=then, edits=edits)

    def update_scale_(self, move: ScaleMove, found_inf: Tensor) -> None:
        """Moves a dynamic loss scale by one step."""
        self._backend.update_scale_(move, found_inf)


def _held(batch: Batch) -> Batch:
    """Returns a batch of what this rank holds."""
    masters = [held_here(master.detach()) for master in batch.masters]
    weights = None if batch.weights is None else [held_here(w.detach()) for w in batch.weights]
    moments = [list(map(held_here, moment)) for moment in batch.moments]
    for others in (*([] if weights is None else [weights]), *moments):
        for master, other in zip(masters, others, strict=True):
            if (other.shape, other.stride()) != (master.shape, master.stride()):
                raise ArgumentError(
                    f"optimizer.state: expected pieces of {list(master.shape)} with strides "
                    f"{master.stride()} like the master's, got {list(other.shape)} with "
                    f"{other.stride()}. Place masters and moments as their parameter is: "
                    "value.redistribute(placements=param.placements)."
                )
    scales = [None if one is None else list(map(held_here, one)) for one in batch.scales]
    return replace(batch, masters=masters, weights=weights, moments=moments, scales=scales)


def _laid_out_like(held: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Returns what this rank holds of gradients, in the layout of what they are for."""
    pairs = zip(held, map(held_here, grads), strict=True)
    return [laid_out_like(buffer, grad) for buffer, grad in pairs]


def _is_shared(tensor: Any) -> bool:
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.size() > 1
