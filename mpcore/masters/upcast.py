"""Optimizer state of 16-bit parameters in float32."""

from __future__ import annotations

from typing import Any

from mpcore.base import SIXTEEN_BIT, map_tensors


def upcast(value: Any) -> Any:
    """Returns optimizer state with every 16-bit tensor in it as float32; the rest as it is."""
    return map_tensors(value, lambda t: t.float() if t.dtype in SIXTEEN_BIT else t)
