"""Rows of mpcore with masters and moments that are no float32 tensors; see docs/memory.md."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from mpcore.bench.contenders import Mpcore
from mpcore.bench.rows import FP32_BOUND, Bound, Row
from mpcore.bench.traffic import Traffic

_BF16_MOMENTS = Bound(
    2**-22, 2**-6, False, "moments rounded at random to 8 bits of significand, three steps"
)
_CODES = Bound(2**-22, 2**-3, False, "moments in 127 or 255 codes a block, three steps")
_ROUNDED = Bound(3 * 2**-9, 0.1, False, "weights rounded at random to BF16 in every step")


class _Way(NamedTuple):
    """How a row keeps its state, what it holds and moves per parameter, and how right it is."""

    masters: str
    moments: str
    regime: str
    held: float
    update: float
    bound: Bound


_WAYS = {
    "split": _Way("split", "float32", "split masters, FP32 moments", 14, 26, FP32_BOUND),
    "split-bf16": _Way("split", "bfloat16", "split masters, BF16 moments", 10, 18, _BF16_MOMENTS),
    "split-int8": _Way("split", "int8", "split masters, 8-bit moments", 8.1, 14, _CODES),
    "none-bf16": _Way("none", "bfloat16", "no masters, BF16 moments", 8, 14, _ROUNDED),
    "none-int8": _Way("none", "int8", "no masters, 8-bit moments", 6.1, 10, _ROUNDED),
}


def compact_rows(dtype: torch.dtype, backend: str, device: torch.device) -> tuple[Row, ...]:
    """Returns a row for each way; weights without masters are bfloat16 in any case.

    Args:
        dtype: float16 or bfloat16, of the parameters where a row has masters.
        backend: Of the rows.
        device: Where they run.

    Example:
        >>> [row.key for row in compact_rows(torch.float16, "auto", torch.device("cpu"))]
        ['split', 'split-bf16', 'split-int8', 'none-bf16', 'none-int8']
    """
    return tuple(_row(key, way, dtype, backend, device) for key, way in _WAYS.items())


def _row(key: str, way: _Way, dtype: torch.dtype, backend: str, device: torch.device) -> Row:
    if way.masters == "none":
        dtype = torch.bfloat16
    half = "FP16" if dtype == torch.float16 else "BF16"
    return Row(
        key=key,
        label=f"mpcore, {key}",
        regime=f"{half} weights and gradients, {way.regime}",
        make=partial(
            Mpcore,
            dtype=dtype,
            path="fused",
            backend=backend,
            masters=way.masters,
            moments=way.moments,
        ),
        traffic=Traffic((("inspect", 2), ("update", way.update))),
        bound=way.bound,
        expected_bytes=way.held,
        missing=None if device.type == "cpu" else "compact states have no kernels of a GPU",
        named_only=True,
    )
