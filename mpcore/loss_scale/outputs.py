"""Multiplying losses by a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpcore.base import label
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
        wide = outputs
        if wide.dtype != torch.float32:
            wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
        here = scale.device == wide.device
        with label("mpcore.scale"):
            return wide * (scale if here else scale.to(wide.device, non_blocking=True))
    if isinstance(outputs, (list, tuple)):
        scaled = [scale_outputs(output, scale) for output in outputs]
        is_named = hasattr(outputs, "_fields")  # a named tuple takes its fields one by one
        return type(outputs)(*scaled) if is_named else type(outputs)(scaled)
    got = f"a tensor of {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ArgumentTypeError(
        f"outputs: expected a floating tensor, or a list or tuple of them, got {got}."
    )
