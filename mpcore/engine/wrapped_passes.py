"""The passes of the general path over tensors that may have no memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpcore.backends import Backend, Inspection, cpu, reference
from mpcore.base import all_in_memory, held_here
from mpcore.errors import ArgumentError


class WrappedPasses:
    """The passes of the general path over tensors that may have no memory of their own.

    Of a DTensor they see what this rank holds. Other wrappers are computed with torch's operations.

    Args:
        backend: Does the passes over tensors in memory.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

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
        here, held = list(map(held_here, grads)), list(map(held_here, outs))
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
                "over several ranks. Clip float32 parameters by torch.nn.utils.clip_grad_norm_ "
                "after unscale_()."
            )
        here = list(map(held_here, grads))
        module = self._for(here, device=coefficient.device)
        return module.inspect(here, coefficient, max_norm, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)  # what no wrapper reaches


def _is_shared(tensor: Any) -> bool:
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.size() > 1
