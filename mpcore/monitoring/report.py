"""The report on a skipped step: which gradients, what kind, where, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mpcore.masters import Overflow
from mpcore.monitoring.findings import Finding
from mpcore.monitoring.verdicts import Verdict, first_few, scale_text

_SHOWN = 12  # finite gradients around those that are not, in text


@dataclass(frozen=True)
class OverflowReport:
    """Why a step was skipped. `str(report)` is for people, `report.to_dict()` for programs.

    Attributes:
        step: Which one, counted from 0.
        verdict: What happened and what to do.
        loss_scale: Of the step.
        next_scale: Of the step after it; None if that is not the optimizer's own.
        loss: Before scaling, the sum of those of its backward passes; None if nobody knows.
        skips_in_a_row: This one included.
        skipped_steps: Since the beginning.
        headroom_before: Doublings of the scale of this step that the largest gradient of the last
            clean steps would have had room for; None if no one looked then.
        findings: Every gradient, in the order of the parameters: the last finite one stands next to
            the layer that first went wrong.
        passes: The backward passes that overflowed, if several were accumulated.
        rank: Of this process, if there are several.
        losses: Of the backward passes, in order, if there were several; None where nobody knows.

    Example:
        >>> finding = Finding("w", (2,), "float16", ("+inf",), (1,), math.inf, None, None)
        >>> verdict = Verdict("search", True, "Too high.")
        >>> print(OverflowReport(0, verdict, 8.0, 4.0, None, 1, 1, None, (finding,)))
        Step 0 was skipped: Too high.
          loss scale 8 -> 4, 1 skipped in a row, 1 so far
          w  +inf first at [1]
    """

    step: int
    verdict: Verdict
    loss_scale: float
    next_scale: float | None
    loss: float | None
    skips_in_a_row: int
    skipped_steps: int
    headroom_before: float | None
    findings: Sequence[Finding]
    passes: tuple[Overflow, ...] = ()
    rank: int | None = None
    losses: tuple[float | None, ...] = ()

    @property
    def overflowed(self) -> list[Finding]:
        """The gradients that were not finite."""
        return [finding for finding in self.findings if not finding.finite]

    def one_line(self) -> str:
        """Returns the report in one line, for a log.

        The numbers are those of the step: `step 12 skipped on rank 1: probe; ...`.
        """
        bad = self.overflowed
        first = f", {bad[0].name} {'/'.join(bad[0].kinds)}" if bad else ""
        passes = ""
        if self.passes:
            numbers = [str(one.micro_batch) for one in self.passes]
            passes = f" in micro-batch {first_few(numbers)}"
        return (
            f"step {self.step} skipped{self._where()}: {self.verdict.name}; "
            f"loss scale {self.scales()}, "
            f"{len(bad)} of {len(self.findings)} gradients{passes}{first}. "
            f"{self.verdict.text}"
        )

    def _of_passes(self) -> str:
        known = [(abs(loss), number) for number, loss in enumerate(self.losses) if loss is not None]
        if not known:
            return ""
        # one that is not finite stands before all
        _, number = max(known, key=lambda one: (not math.isfinite(one[0]), one[0]))
        largest = f"the largest {self.losses[number]:g} in micro-batch {number}"
        return f" (the sum of {len(self.losses)}, {largest})"

    def _where(self) -> str:
        return "" if self.rank is None else f" on rank {self.rank}"

    def scales(self) -> str:
        """Returns the loss scale of this step and of the next as text."""
        after = "?" if self.next_scale is None else scale_text(self.next_scale)
        return f"{scale_text(self.loss_scale)} -> {after}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and strings; what is not finite becomes a string, as JSON wants."""
        return {"kind": "overflow", **plain(as_dict(self))}

    def __str__(self) -> str:
        lines = [
            f"Step {self.step} was skipped{self._where()}: {self.verdict}",
            f"  loss scale {self.scales()}, "
            f"{self.skips_in_a_row} skipped in a row, {self.skipped_steps} so far"
            + ("" if self.loss is None else f", loss {self.loss:g}{self._of_passes()}"),
        ]
        if self.headroom_before is not None:
            lines.append(f"  headroom before: {self.headroom_before:.1f} doublings")
        for one in self.passes:
            name = f" of loss {one.loss!r}" if one.loss else ""
            lines.append(f"  micro-batch {one.micro_batch}{name}: {', '.join(one.parameters)}")
        lines += [f"  {row}" for row in _rows(self.findings)]
        return "\n".join(lines)


def own_rank() -> int | None:
    """Returns the rank of this process, None if there is one process; no host sync.

    Example:
        >>> own_rank()
    """
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if there else None


def _rows(findings: Sequence[Finding]) -> list[str]:
    """Returns a line for each gradient that is not finite, and for its neighbours that are."""
    near = {
        i + shift
        for i, finding in enumerate(findings)
        if not finding.finite
        for shift in (-1, 0, 1)
    }
    width = max((len(finding.name) for finding in findings), default=0)
    rows, left_out = [], 0
    for i, finding in enumerate(findings):
        if i not in near and len(findings) > _SHOWN:
            left_out += 1
            continue
        if left_out:
            rows.append(f"... {left_out} finite")
            left_out = 0
        rows.append(f"{finding.name:<{width}}  {_described(finding)}")
    return rows + ([f"... {left_out} finite"] if left_out else [])


def _described(finding: Finding) -> str:
    if not finding.finite:
        at = "" if finding.first_bad is None else f" first at {list(finding.first_bad)}"
        return f"{', '.join(finding.kinds)}{at}"
    room = "" if finding.headroom_bits is None else f", {finding.headroom_bits:.1f} bits left"
    return f"finite, norm {finding.norm:.3g}{room}"


def as_dict(record: Any) -> dict[str, Any]:
    """Returns the fields of a record, its findings as dictionaries too.

    Example:
        >>> finding = Finding("w", (2,), "float16", (), None, 1.0, 1.0, None)
        >>> verdict = Verdict("search", True, "Too high.")
        >>> report = OverflowReport(0, verdict, 8.0, 4.0, None, 1, 1, None, (finding,))
        >>> as_dict(report)["findings"][0]["name"]
        'w'
    """
    return asdict(replace(record, findings=tuple(record.findings)))


def plain(value: Any) -> Any:
    """Returns what JSON can hold: tuples as lists, numbers that are not finite as strings.

    Example:
        >>> plain({"a": (1, math.inf), "b": None})
        {'a': [1, 'inf'], 'b': None}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
