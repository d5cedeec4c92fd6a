"""Multiplying losses by a scale, and the protocol by which an outside scaler drives a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcore.errors import ArgumentTypeError


def scale_outputs(outputs: Any, scale: Tensor) -> Any:
    """Returns `outputs` times `scale`, computed in float32 or wider; no host sync.

    Args:
        outputs: A floating tensor, or a list or tuple of outputs.
        scale: 0-d float32.

    Raises:
        ArgumentTypeError: Something else is in there.
    """
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return wide * scale.to(outputs.device, non_blocking=True)
    if isinstance(outputs, (list, tuple)):
        scaled = [scale_outputs(output, scale) for output in outputs]
        is_named = hasattr(outputs, "_fields")  # a named tuple takes its fields one by one
        return type(outputs)(*scaled) if is_named else type(outputs)(scaled)
    got = f"a tensor of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ArgumentTypeError(
        f"outputs: expected a floating tensor, or a list or tuple of them, got {got}."
    )


@dataclass(frozen=True)
class External:
    """What `torch.amp.GradScaler` hands to an optimizer that supports scaled steps.

    Attributes:
        scale: 0-d float32; what the gradients still have to be divided by.
        found_inf: 0-d; non-zero means overflow.
    """

    scale: Tensor
    found_inf: Tensor

    @staticmethod
    def leave(optimizer: object) -> None:
        """Ends such a step that failed: the scaler would take back what it handed over too late."""
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)

    @classmethod
    def of(cls, optimizer: object) -> External | None:
        """Returns what was handed to `optimizer`, None outside of such a step."""
        handed = vars(optimizer)
        found_inf = handed.get("found_inf")
        if found_inf is None:
            return None
        if not isinstance(found_inf, Tensor):  # the sum of no flags at all: there is no gradient
            found_inf = torch.tensor(found_inf)
        scale = handed.get("grad_scale")
        if scale is None:  # GradScaler.unscale_ was called before
            scale = torch.ones((), dtype=torch.float32, device=found_inf.device)
        return cls(scale.reshape(()), found_inf)
