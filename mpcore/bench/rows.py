"""The rows of the table: what each is called, how it is built, when it counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mpcore.bench.contenders import Contender, MastersLoop, Mpcore, TorchAmp
from mpcore.bench.problem import Problem
from mpcore.bench.traffic import (
    AMP_FOREACH,
    AMP_FUSED,
    MASTERS_LOOP,
    MPCORE_ALWAYS,
    MPCORE_FUSED,
    MPCORE_GENERAL,
    MPCORE_READ,
    Traffic,
)


@dataclass(frozen=True)
class Bound:
    """How far a row's weights may be from the float64 ones after the checked steps.

    The distance is measured in allowances of `relative * |weight| + in_steps * lr` each.

    Attributes:
        relative: Share of the weight.
        in_steps: Share of the learning rate, which is about what one AdamW step moves a weight by.
        largest: Whether the largest distance counts, or the mean.
        reason: Why it is what it is.
    """

    relative: float
    in_steps: float
    largest: bool
    reason: str

    def __str__(self) -> str:
        kind = "largest" if self.largest else "mean"
        return (
            f"{kind} error at most {self.relative:.2g} |w| + {self.in_steps:.2g} lr: {self.reason}"
        )


FP32_BOUND = Bound(2**-22, 2**-11, True, "FP32 arithmetic, three steps")
# On a CPU, torch's FP32 norm of GPT-2's gradients came out 7.5e-4 too small, which moved weights by
# 3.9e-4 lr; AdamW in float64 with that norm was within 2.5e-5 lr of torch's weights.
TORCH_NORM_BOUND = Bound(
    2**-22, 2**-9, True, "FP32 arithmetic, three steps, clipped by torch's FP32 norm"
)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        key: What `--rows` calls it.
        label: What tables call it.
        regime: Formats of weights, gradients and state.
        make: Builds it.
        traffic: Bytes moved, stated.
        bound: When its result counts as right.
        expected_bytes: Per parameter at the most, to see whether it fits into memory.
        missing: Why it cannot run here; None if it can.
        version: Of the library that is neither mpcore nor torch, where it is known.
        named_only: Whether it runs only where it is asked for by its key.
    """

    key: str
    label: str
    regime: str
    make: Callable[[Problem], Contender]
    traffic: Traffic
    bound: Bound
    expected_bytes: float
    missing: str | None = None
    version: str | None = None
    named_only: bool = False


#: What other rows are compared with.
BASELINE = "amp-fused"
LOOP = "masters-loop"


def own_rows(dtype: torch.dtype, backend: str, device: torch.device) -> tuple[Row, ...]:
    """Returns the rows that need PyTorch alone.

    Args:
        dtype: float16 or bfloat16, of the parameters where a row has masters.
        backend: Of the mpcore rows that do not name one themselves.
        device: Where they run.

    Example:
        >>> [row.key for row in own_rows(torch.float16, "auto", torch.device("cpu"))][:5]
        ['fused', 'watched', 'read', 'edits', 'cpu']
    """
    half = "FP16" if dtype == torch.float16 else "BF16"
    masters = f"{half} weights and gradients, FP32 masters and moments"
    by_hand = Row(
        key=LOOP,
        label="masters by hand",
        regime=f"{masters}, FP32 gradients too",
        make=lambda problem: MastersLoop(problem, dtype),
        traffic=MASTERS_LOOP,
        bound=TORCH_NORM_BOUND,
        expected_bytes=20,
    )
    blocks = Row(
        key="cpu",
        label="mpcore, cpu backend",
        regime=masters,
        make=lambda problem: Mpcore(problem, dtype, "fused", "cpu"),
        traffic=MPCORE_FUSED,
        bound=FP32_BOUND,
        expected_bytes=16,
        missing=None if device.type == "cpu" else "runs on a CPU only",
    )
    fused, general = _mpcore_rows(dtype, backend, masters)
    edits = replace(
        fused,
        key="edits",
        label="mpcore, always looking for edits",
        make=lambda problem: Mpcore(problem, dtype, "fused", backend, on_weight_edit="always"),
        traffic=MPCORE_ALWAYS,
    )
    watched = _watched_rows(dtype, backend, fused)
    return (fused, *watched, edits, blocks, general, *_amp_rows(), by_hand)


def _mpcore_rows(dtype: torch.dtype, backend: str, regime: str) -> tuple[Row, Row]:
    fused = Row(
        key="fused",
        label="mpcore, fused",
        regime=regime,
        make=lambda problem: Mpcore(problem, dtype, "fused", backend),
        traffic=MPCORE_FUSED,
        bound=FP32_BOUND,
        expected_bytes=16,
    )
    general = Row(
        key="general",
        label="mpcore, general",
        regime=regime,
        make=lambda problem: Mpcore(problem, dtype, "general", backend),
        traffic=MPCORE_GENERAL,
        bound=FP32_BOUND,
        expected_bytes=20,
    )
    return fused, general


def _watched_rows(dtype: torch.dtype, backend: str, fused: Row) -> tuple[Row, Row]:
    """Returns the fused step under a monitor: a step between readings, and one with a reading."""
    between = replace(
        fused,
        key="watched",
        label="mpcore, watched",
        make=lambda problem: Mpcore(problem, dtype, "fused", backend, every=10**9),
    )
    reading = replace(
        fused,
        key="read",
        label="mpcore, read each step",
        make=lambda problem: Mpcore(problem, dtype, "fused", backend, every=1),
        traffic=MPCORE_READ,
        expected_bytes=20,
    )
    return between, reading


def _amp_rows() -> tuple[Row, Row]:
    regime = "FP32 weights, gradients and moments"
    fused = Row(
        key=BASELINE,
        label="torch AMP, fused",
        regime=regime,
        make=lambda problem: TorchAmp(problem, fused=True),
        traffic=AMP_FUSED,
        bound=TORCH_NORM_BOUND,
        expected_bytes=16,
    )
    foreach = Row(
        key="amp-foreach",
        label="torch AMP, foreach",
        regime=regime,
        make=lambda problem: TorchAmp(problem, fused=False),
        traffic=AMP_FOREACH,
        bound=TORCH_NORM_BOUND,
        expected_bytes=20,
    )
    return fused, foreach
