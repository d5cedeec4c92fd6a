"""A wrapped optimizer over 16-bit parameters, and beside it the same one over FP32 copies.

The copies are the oracle: plain `torch.optim`, which is given the unscaled gradients and simply not
stepped when a step overflows. It shares nothing with mpcore, not even the loss scale, whose course
is written down here a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import mpcore
import torch
from torch import Tensor

from mpcore_testing.bits import bits, rounded, same_bits
from mpcore_testing.engines import GENERAL
from mpcore_testing.optimizers import Case

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
#: Grows every 5 clean steps and stays where random float16 gradients are finite.
LOSS_SCALE = mpcore.DynamicLossScale(init=2.0**10, growth_interval=5, max_scale=2.0**13)


@dataclass
class ScaleOracle:
    """The course of `LOSS_SCALE`, in plain numbers."""

    scale: float = LOSS_SCALE.init
    clean: int = 0
    steps: int = 0
    skipped: int = 0

    def advance(self, overflow: bool) -> None:
        """Counts one step."""
        self.steps += 1
        if overflow:
            self.skipped += 1
            self.scale, self.clean = max(self.scale / 2, 1.0), 0
            return
        self.clean += 1
        if self.clean == 5:
            self.scale, self.clean = min(self.scale * 2, 2.0**13), 0


def mixed_groups(generator: torch.Generator, *, matrices_only: bool) -> list[list[Tensor]]:
    """Returns two groups of parameters: float16, bfloat16 and float32, one of them transposed."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    plan = [[((3, 5), half), ((6, 4), brain), ((5, 2), full)], [((2, 3), brain), ((7, 1), half)]]
    if not matrices_only:
        plan[0].append(((), half))
        plan[1] += [((9,), full), ((70,), brain)]
    groups = []
    for entries in plan:
        values = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in entries]
        groups.append([torch.nn.Parameter(value) for value in values])
    transposed = groups[0][1].detach().t()  # dense, but not contiguous
    groups[0][1] = torch.nn.Parameter(transposed)
    return groups


def random_gradient(param: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Returns what a backward pass of the scaled loss could have left: 16-bit, finite, times S."""
    spread = 2.0 ** torch.randint(-12, 1, param.shape, generator=generator)
    values = torch.randn(param.shape, generator=generator) * spread * scale
    grad = torch.empty_like(param)
    with torch.no_grad():
        grad.copy_(values)
    return grad


def spoil(grad: Tensor, value: float, generator: torch.Generator) -> Tensor:
    """Returns `grad` with one element, anywhere, replaced by `value`."""
    spoilt = grad.clone()
    index = int(torch.randint(grad.numel(), (), generator=generator))
    spoilt[torch.unravel_index(torch.tensor(index), grad.shape)] = value
    return spoilt


@dataclass
class Twins:
    """The wrapped optimizer and its oracle.

    Attributes:
        wrapped: The optimizer under test.
        params: Its parameters.
        plain: The same optimizer over `copies`.
        copies: FP32 copies of `params`.
        scale: The course of the loss scale.
    """

    wrapped: mpcore.MixedPrecisionOptimizer
    params: list[Tensor]
    plain: torch.optim.Optimizer
    copies: list[Tensor]
    scale: ScaleOracle = field(default_factory=ScaleOracle)

    @classmethod
    def of(cls, case: Case, groups: Sequence[Sequence[Tensor]]) -> Twins:
        """Returns both over `groups`; the second and later groups get half the learning rate."""
        copies = [
            [torch.nn.Parameter(p.detach().clone().float()) for p in group] for group in groups
        ]
        lr = case.options["lr"]

        def with_options(tensors: Sequence[Sequence[Tensor]]) -> list[dict[str, object]]:
            first, *rest = [{"params": list(group)} for group in tensors]
            return [first, *({**group, "lr": lr / 2} for group in rest)]

        wrapped = GENERAL.wrap(case.build(with_options(groups)), LOSS_SCALE)
        plain = case.build(with_options(copies))
        return cls(wrapped, list(chain(*groups)), plain, list(chain(*copies)))

    def give(self, grads: Sequence[Tensor | None]) -> None:
        """Gives `grads` to the parameters and, unscaled in float64, to the copies."""
        for param, copy, grad in zip(self.params, self.copies, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
            copy.grad = None if grad is None else (grad.double() / self.scale.scale).float()

    def step(self, *, overflow: bool) -> None:
        """Steps the wrapped optimizer, and the plain one unless this step overflows."""
        any_gradient = any(param.grad is not None for param in self.params)
        self.wrapped.step()
        if not overflow:
            self.plain.step()
        if any_gradient:
            self.scale.advance(overflow)

    def set_lr(self, factor: float) -> None:
        """Multiplies every learning rate, as a scheduler does."""
        for group in (*self.wrapped.param_groups, *self.plain.param_groups):
            group["lr"] *= factor

    def master(self, param: Tensor) -> Tensor:
        """Returns `param`'s master: itself in float32, a widened copy before the first gradient."""
        if param.dtype not in SIXTEEN_BIT:
            return param
        master: Tensor = self.wrapped.state.get(param, {}).get("master", param.detach().float())
        return master

    def differences(self) -> list[str]:
        """Returns what is not bitwise equal to the oracle; empty is what a test wants."""
        found = []
        for number, (param, copy) in enumerate(zip(self.params, self.copies, strict=True)):
            if not same_bits(self.master(param).detach(), copy.detach()):
                found.append(f"master {number}")
            if not same_bits(param.detach(), rounded(copy, param.dtype)):
                found.append(f"weight {number}")
            if not self._same_state(param, copy):
                found.append(f"state {number}")
        if not self._same_options():
            found.append("group options")
        return found

    def _same_state(self, param: Tensor, copy: Tensor) -> bool:
        shown = {k: v for k, v in self.wrapped.state.get(param, {}).items() if k != "master"}
        inner = dict(self.wrapped.inner.state.get(self.master(param), shown))
        if param.dtype in SIXTEEN_BIT and "master" not in self.wrapped.state.get(param, {}):
            # what the optimizer's constructor made waits in 16 bits for the master
            shown = inner = {k: _widened(v) for k, v in shown.items()}
        expected = dict(self.plain.state.get(copy, {}))
        if not expected:  # an optimizer that skips on the device may have made its state: of zeros
            return same_bits(shown, inner) and all(map(_blank, inner.values()))
        return same_bits(shown, expected) and same_bits(inner, expected)

    def _same_options(self) -> bool:
        def options(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
            groups = optimizer.param_groups
            # "mpcore" is the wrapper's own
            return [{k: v for k, v in g.items() if k not in ("params", "mpcore")} for g in groups]

        return same_bits(options(self.wrapped), options(self.plain))


def _widened(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in SIXTEEN_BIT:
        return value.float()
    return value


def _blank(value: object) -> bool:
    return not (bits(value).any() if isinstance(value, Tensor) else value)
