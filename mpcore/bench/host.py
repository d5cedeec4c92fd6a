"""`mpcore bench --host`: what a step costs the host, kernels left out.

With kernels stubbed out, what remains is Python: reading param groups, collecting gradients,
sorting tensors, building arguments. On a GPU it is what a step takes when the device is not the one
that is waited for. Two measurements:

- "no kernels": the backend of mpcore is replaced by one whose functions return at once, and
  `torch._fused_adamw_` by a function that does nothing, in this process and while it is measured;
- "whole backend": nothing is replaced and the tensors have one element, so that the arithmetic is
  nothing and what a backend does around its kernels counts as well.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mpcore.backends import Inspection
from mpcore.base import Table
from mpcore.bench.experiment import check_device
from mpcore.bench.problem import ADAMW
from mpcore.bench.tensors import synchronize
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.loss_scale import DynamicLossScale

GROUPS = 4


@dataclass(frozen=True)
class HostTime:
    """Seconds of host time per step.

    Attributes:
        label: What stepped.
        bare: Median with kernels stubbed out.
        whole: Median with real kernels on tensors of one element.
    """

    label: str
    bare: float
    whole: float


class NoKernels:
    """A backend whose functions do nothing: what is left is the host's work around them.

    Args:
        inspection: What `inspect` returns.
    """

    #: as the kernels do that it stands for
    prepares_on_the_way = True

    def __init__(self, inspection: Inspection) -> None:
        self._inspection = inspection

    def plan_update(self, rule: str, batches: Sequence[Any]) -> object:
        """Returns something to hold on to."""
        return object()

    def prepare_(self, plan: Any, hyper: Any) -> None:
        """Does nothing."""

    def unscale_(self, grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
        """Does nothing."""

    def inspect(
        self,
        grads: Sequence[Tensor],
        coefficient: Tensor,
        max_norm: float | None,
        *,
        inverted: bool = False,
        statistics: bool = False,
        plan: Any = None,
        hyper: Any = None,
    ) -> Inspection:
        """Returns always the same."""
        return self._inspection

    def update_(
        self,
        plan: Any,
        grads: Sequence[Sequence[Tensor]],
        coefficient: Tensor,
        found_inf: Tensor,
        saturated: Tensor,
        then: Any = None,
        edits: Any = None,
    ) -> None:
        """Does nothing."""


class _Stubbed(MixedPrecisionOptimizer):
    """The optimizer without kernels."""

    def _start(self) -> None:
        device = self._params()[0].device
        count = len(self._params())
        found = self._module.inspect(
            [torch.zeros(1, device=device)], torch.ones((), device=device), None
        )
        kinds = torch.zeros(count, dtype=torch.int32, device=device)
        values = {name: getattr(found, name) for name in Inspection.__dataclass_fields__}
        stub: Any = NoKernels(Inspection(**{**values, "kinds": kinds}))
        self._module = stub
        super()._start()


def run_host(
    device: torch.device, rounds: int, backend: str, tensors: int = 1000
) -> tuple[HostTime, ...]:
    """Measures host time per step: mpcore's fused step, and torch's fused AdamW.

    Args:
        device: Where the tensors are.
        rounds: Measured steps of each, interleaved.
        backend: Of mpcore.
        tensors: How many, in four param groups with different learning rates.

    Raises:
        ArgumentError: The device is not there.
    """
    check_device(device)
    makers: dict[str, Callable[[bool], _Steps]] = {
        "mpcore, fused: step": lambda bare: _mpcore(device, backend, tensors, bare, clip=False),
        "mpcore, fused: clip and step": lambda bare: _mpcore(
            device, backend, tensors, bare, clip=True
        ),
        "torch AdamW(fused=True): step": lambda bare: _torch(device, tensors, bare),
    }
    bare, whole = (
        _rounds({label: make(stub) for label, make in makers.items()}, device, rounds)
        for stub in (True, False)
    )
    return tuple(HostTime(label, bare[label], whole[label]) for label in makers)


@dataclass(frozen=True)
class _Steps:
    """What is called between steps, untimed, and what is timed."""

    before: Callable[[], object]
    step: Callable[[], object]
    stub: bool = False  # whether torch's kernel is replaced meanwhile


def _params(device: torch.device, dtype: torch.dtype, tensors: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(1, dtype=dtype, device=device)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def _groups(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[i::GROUPS], "lr": 1e-3 * (i + 1)} for i in range(GROUPS)]


def _mpcore(device: torch.device, backend: Any, tensors: int, bare: bool, *, clip: bool) -> _Steps:
    params = _params(device, torch.float16, tensors)
    inner = torch.optim.AdamW(_groups(params), **ADAMW)
    kind = _Stubbed if bare else MixedPrecisionOptimizer
    optimizer = kind(inner, DynamicLossScale(init=2.0**10), path="fused", backend=backend)
    loss = torch.zeros((), device=device)

    def step() -> None:
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    return _Steps(lambda: optimizer.scale(loss), step)


def _torch(device: torch.device, tensors: int, bare: bool) -> _Steps:
    params = _params(device, torch.float32, tensors)
    optimizer = torch.optim.AdamW(_groups(params), **ADAMW, fused=True)
    return _Steps(lambda: None, optimizer.step, stub=bare)


def _rounds(contenders: dict[str, _Steps], device: torch.device, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for done in range(-2, rounds):  # two rounds to warm up
        for label, contender in contenders.items():
            contender.before()
            taken = _host_seconds(contender, device)
            if done >= 0:
                seconds[label].append(taken)
    return {label: statistics.median(values) for label, values in seconds.items()}


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for `torch._fused_adamw_`; a mock object would take longer to call."""


def _host_seconds(contender: _Steps, device: torch.device) -> float:
    """Returns the time until a step returns; a GPU may then still be working."""
    stub = mock.patch.object(torch, "_fused_adamw_", new=_nothing)
    synchronize(device)
    with stub if contender.stub else nullcontext():
        collecting = gc.isenabled()
        gc.disable()
        started = time.perf_counter()
        contender.step()
        taken = time.perf_counter() - started
        if collecting:
            gc.enable()
    return taken


def host_table(measured: tuple[HostTime, ...], tensors: int = 1000) -> Table:
    """Returns the table of host times.

    Args:
        measured: torch last.
        tensors: How many there were.
    """
    torch_time = measured[-1]
    return Table(
        title=f"Host time per step: {tensors:,} tensors in {GROUPS} param groups",
        header=("Step", "No kernels ms", "vs torch", "Whole backend ms", "vs torch"),
        rows=tuple(
            (
                time.label,
                f"{1e3 * time.bare:.3f}",
                f"{time.bare / torch_time.bare:.2f}x",
                f"{1e3 * time.whole:.3f}",
                f"{time.whole / torch_time.whole:.2f}x",
            )
            for time in measured
        ),
        notes=(
            "No kernels: mpcore's backend does nothing, and torch._fused_adamw_ is replaced by a "
            "function that does nothing while it is measured.",
            "Whole backend: real kernels on tensors of one element, so that what a backend does "
            "around its kernels counts as well.",
            "torch's step neither unscales nor clips; mpcore's does the first, and the second "
            "where it says so.",
        ),
    )
