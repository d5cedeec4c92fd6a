"""Every way in which a step can be computed on a CPU: which backend does the passes, and the path.

Tests of behaviour take the fixture `engine`, which is each of `ENGINES` in turn; tests of one path
name it. This list is the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import mpcore
import pytest
import torch
from torch import Tensor

from mpcore_testing.bits import bits

#: The types that have a fused update, written down a second time.
FUSABLE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
    mpcore.optim.Lion,
)

#: What a fused step may differ by, in units of 2^-24 of the weight, the learning rate and each
#: step: the master is rounded once (half a unit each on both sides), the update has about a dozen
#: roundings, among them moments whose errors last for 1 / (1 - beta) steps.
UNITS = 16


@dataclass(frozen=True)
class Engine:
    """A backend and a path.

    Attributes:
        backend: Its name.
        path: "general" or "fused".
    """

    backend: str
    path: str

    def wrap(
        self,
        inner: torch.optim.Optimizer,
        loss_scale: Any = mpcore.DynamicLossScale(),  # noqa: B008 - a frozen value
        on_weight_edit: str = "adopt",
        masters: Literal["float32", "split", "none"] = "float32",
        moments: Literal["float32", "bfloat16", "int8"] = "float32",
        seed: int = 0,
    ) -> mpcore.MixedPrecisionOptimizer:
        """Returns `inner`, wrapped; both are asked for by name, so neither can be another."""
        return mpcore.MixedPrecisionOptimizer(
            inner,
            loss_scale,
            backend=self.backend,
            path=self.path,
            on_weight_edit=on_weight_edit,
            masters=masters,
            moments=moments,
            seed=seed,
        )

    @property
    def fused(self) -> bool:
        """Whether the backend computes the step."""
        return self.path == "fused"

    def dtypes(self, dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
        """Returns those that the path takes: float64 is for the general one alone."""
        return [dtype for dtype in dtypes if not self.fused or dtype != torch.float64]

    def agree(self, actual: Tensor, expected: Tensor, *, steps: int, lr: float = 0.1) -> bool:
        """Whether masters agree with `torch.optim`: bitwise, or fused within `UNITS` a step.

        For gradients that do not depend on the weights: errors add up and nothing amplifies them.
        """
        actual, expected = actual.detach(), expected.detach()
        if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
            return False
        if not self.fused:
            return torch.equal(bits(actual.contiguous()), bits(expected.contiguous()))
        allowed = steps * UNITS * 2.0**-24 * (expected.double().abs() + lr)
        return bool(((actual.double() - expected.double()).abs() <= allowed).all())

    def __str__(self) -> str:
        return f"{self.backend}-{self.path}"


GENERAL = Engine("reference", "general")
ENGINES = [
    GENERAL,
    Engine("reference", "fused"),
    Engine("cpu", "general"),
    Engine("cpu", "fused"),
    Engine("compiled", "general"),
    Engine("compiled", "fused"),
]
FUSED = [engine for engine in ENGINES if engine.fused]
#: torch's fused kernels know float32 masters alone.
PACKING = [engine for engine in ENGINES if engine.backend != "cpu"]


def can_fuse(build: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """Whether what `build` makes of a list of parameters has a fused update."""
    optimizer = build([torch.nn.Parameter(torch.ones(1, 1))])
    asked = any(group.get("foreach") is not None for group in optimizer.param_groups)
    return type(optimizer) in FUSABLE and not asked


def engines_for(build: Callable[[Any], torch.optim.Optimizer]) -> list[Engine]:
    """Returns the engines that can step what `build` makes."""
    return [engine for engine in ENGINES if not engine.fused or can_fuse(build)]


def engine_cases(inners: dict[str, Any], names: Iterable[str] | None = None) -> list[Any]:
    """Returns (name, engine) for each optimizer of a table and each engine that can step it."""
    return [
        pytest.param(name, engine, id=f"{name}-{engine}")
        for name in (inners if names is None else names)
        for engine in engines_for(inners[name])
    ]
