"""What a cast did, as a value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcore.base import Table


@dataclass(frozen=True)
class CastRow:
    """What a cast did to one thing.

    Attributes:
        name: Of the module or buffer, as in `model.named_modules()` and `model.named_buffers()`.
        what: "weights", "module" or "buffer".
        dtype: What it is in now.
        error: The largest difference that rounding made to a value, 0 where there was none.
        reason: Why.
    """

    name: str
    what: str
    dtype: torch.dtype
    error: float
    reason: str


@dataclass(frozen=True)
class CastReport:
    """What `cast_model` did to a model. `str(report)` is a table.

    Attributes:
        dtype: What was cast to.
        rows: The weights that were cast, the modules that were kept, and every floating buffer
            outside of these.
        named: The buffers that `keep_fp32` named.

    Example:
        >>> row = CastRow("rope.inv_freq", "buffer", torch.float32, 0.0, "a position code")
        >>> print(CastReport(torch.float16, (row,), frozenset()))
        | name | what | type | largest error | why |
        |---|---|---|---|---|
        | rope.inv_freq | buffer | float32 | 0 | a position code |
    """

    dtype: torch.dtype
    rows: tuple[CastRow, ...]
    named: frozenset[str]

    @property
    def kept_buffers(self) -> frozenset[str]:
        """The buffers of 16-bit modules that are in FP32."""
        rows = (row for row in self.rows if row.what == "buffer")
        return frozenset(row.name for row in rows if row.dtype != self.dtype)

    def with_kept(self, name: str, reason: str) -> CastReport:
        """Returns the report after a buffer was widened to FP32."""
        rows = tuple(
            replace(row, dtype=torch.float32, error=0.0, reason=reason)
            if (row.what, row.name) == ("buffer", name)
            else row
            for row in self.rows
        )
        return replace(self, rows=rows)

    def __str__(self) -> str:
        header = ("name", "what", "type", "largest error", "why")
        rows = tuple(
            (r.name, r.what, str(r.dtype).removeprefix("torch."), f"{r.error:.3g}", r.reason)
            for r in self.rows
        )
        return "\n".join(Table("", header, rows, ()).to_markdown().splitlines()[2:-1])
