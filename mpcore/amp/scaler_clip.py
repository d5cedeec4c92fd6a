"""One clip of the gradients of several optimizers, which then skip together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.base import check_number
from mpcore.errors import ArgumentError, ArgumentTypeError


def check_clip(optimizers: Sequence[torch.optim.Optimizer], max_norm: float) -> list[Tensor]:
    """Returns the parameters of some optimizers that have a gradient; raises if one clip cannot be.

    Raises:
        ArgumentTypeError: They are no list of optimizers, or `max_norm` is no number.
        ArgumentError: There are none, one is there twice, a parameter with a gradient is in two
            of them or a DTensor, or `max_norm` is not above 0.
    """
    name = "GradScaler.clip_grad_norm_"
    if not isinstance(optimizers, (list, tuple)) or not all(
        isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers
    ):
        raise ArgumentTypeError(
            f"{name}: expected a list of optimizers, got {type(optimizers).__name__}. Write "
            "scaler.clip_grad_norm_([muon, adamw], 1.0)."
        )
    if not optimizers or len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ArgumentError(
            f"{name}: expected each optimizer once, got {len(optimizers)} with "
            f"{len({id(optimizer) for optimizer in optimizers})} different ones."
        )
    if not check_number("max_norm", max_norm) > 0:
        raise ArgumentError(f"max_norm: expected a number above 0, got {max_norm}.")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    params: list[Tensor] = [p for group in groups for p in group["params"] if p.grad is not None]
    seen: set[int] = set()
    for param in params:
        if id(param) in seen:
            raise ArgumentError(
                f"{name}: expected each parameter that has a gradient once, got one of shape "
                f"{list(param.shape)} twice: it would be unscaled twice, and count twice in the "
                "norm. Leave it in one group of one optimizer or, if several step it in turn, "
                "clip with the one whose turn it is."
            )
        seen.add(id(param))
    if any(hasattr(param, "device_mesh") for param in params):
        raise ArgumentError(
            f"{name}: expected parameters that this process has whole, got a DTensor. Call "
            "unscale_ for each optimizer and torch.nn.utils.clip_grad_norm_(model.parameters(), "
            "max_norm), which knows meshes; each optimizer then skips by itself."
        )
    return params


@torch.no_grad()
def clip_(params: Sequence[Tensor], max_norm: float, found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Clips the global 2-norm of unscaled gradients in place, unless it is not finite; no sync.

    Args:
        params: They have gradients.
        max_norm: Above 0.
        found: Flags of their optimizers, 0-d: not 0 where a gradient is not finite.

    Returns:
        The norm before clipping, 0-d, and a flag for all: 1 if a gradient, or their norm, is not
        finite, 0 otherwise.
    """
    grads = [param.grad for param in params if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    flags = [norm.isfinite().logical_not(), *(flag.to(norm.device) != 0 for flag in found)]
    skips = torch.stack(flags).any()
    # 0 leaves gradients as they are: all of them will be skipped, and reports name the culprits
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm.masked_fill(skips, 0.0))
    return norm, skips.float()
