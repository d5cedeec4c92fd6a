"""The protocol by which an outside scaler, such as torch.amp's, drives a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
