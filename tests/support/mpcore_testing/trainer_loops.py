"""What trainers are compared with: a plain loop of our own over the same batches.

A trainer differs from it in who calls what. So the bits of masters, scales and learning rates have
to be the same, unless a test says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mpcore
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

#: Of all runs, so that the scale grows and falls within a few steps.
SCALING = mpcore.DynamicLossScale(2.0**10, growth_interval=3)


@dataclass(frozen=True)
class Course:
    """What a training does, whoever runs its loop.

    Attributes:
        dtype: Of the weights.
        steps: Updates, skipped ones included.
        passes: Backward passes for each.
        max_norm: What gradients are clipped to; None: they are not.
        overflows: The backward passes, counted from 0, in which a gradient becomes infinite.
        fused: Whether the wrapped AdamW is torch's fused one.
    """

    dtype: torch.dtype = torch.float16
    steps: int = 8
    passes: int = 1
    max_norm: float | None = None
    overflows: Sequence[int] = ()
    fused: bool = False

    @property
    def scales(self) -> bool:
        """Whether losses are scaled."""
        return self.dtype == torch.float16


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small network with numbers that are no multiples of anything."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)).to(dtype)


def adamw(params: Any, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW with every option that moves a bit."""
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1, fused=fused)


def schedule(optimizer: Any) -> LambdaLR:
    """Another learning rate in each step."""
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def batches(
    count: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Iterator[list[Tensor]]:
    """Pairs of inputs and targets; targets are float32."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(4, 6, generator=draw)
        yield [x.to(dtype), torch.stack([x.sum(1), x.amax(1), x[:, 0]], dim=1)]


class Overflows:
    """Makes a gradient infinite in some backward passes, before anybody has seen it."""

    def __init__(self, param: Tensor, passes: Sequence[int]) -> None:
        self._passes = passes
        self._count = 0
        param.register_hook(self)

    def __call__(self, grad: Tensor) -> Tensor:
        self._count += 1
        return grad * torch.inf if self._count - 1 in self._passes else grad


def prepared(course: Course, model: nn.Module) -> Any:
    """The optimizer of a course, around the parameters of a model, and what overflows in it."""
    params = dict(model.named_parameters())
    Overflows(list(params.values())[-1], course.overflows)
    scaling = SCALING if course.scales else mpcore.NoLossScale()
    inner = adamw(list(params.items()), fused=course.fused)
    return mpcore.MixedPrecisionOptimizer(inner, scaling)


def masters(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Copies of the masters, of float32 parameters themselves."""
    state = optimizer.state
    return [state.get(p, {}).get("master", p).detach().clone() for p in model.parameters()]


@dataclass
class Outcome:
    """What a training has come to."""

    masters: list[Tensor]
    rates: list[float]
    skipped: list[bool]

    def check_same(self, other: Outcome) -> None:
        """Fails unless every bit and every decision are those of another training."""
        assert self.skipped == other.skipped
        assert self.rates == other.rates
        for mine, theirs in zip(self.masters, other.masters, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def own_loop(
    course: Course,
    model: nn.Module,
    data: Iterator[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    autocast: bool = False,
    clip: Callable[[Any, nn.Module, float], Any] | None = None,
    optimizer: Any = None,
    schedules: bool = True,
) -> Outcome:
    """Trains as the documentation's loop does, the schedule waiting while a step is skipped.

    Args:
        course: What is done.
        model: Trained.
        data: A batch for each backward pass.
        loss_of: Its loss on a batch.
        autocast: Whether the forward pass runs under autocast to the dtype of the course.
        clip: How gradients are unscaled and clipped; None: as torch does after `unscale_`.
        optimizer: Of the model; None: as every course has it.
        schedules: Whether the learning rate moves.
    """
    optimizer = prepared(course, model) if optimizer is None else optimizer
    scheduler = schedule(optimizer)
    rates, skipped = [], []
    for _ in range(course.steps):
        for _ in range(course.passes):
            with torch.autocast("cpu", dtype=course.dtype) if autocast else nullcontext():
                loss = loss_of(model, next(data))
            optimizer.backward(loss / course.passes)
        if course.max_norm is not None and clip is not None:
            clip(optimizer, model, course.max_norm)
        elif course.max_norm is not None:
            optimizer.unscale_()
            torch.nn.utils.clip_grad_norm_(model.parameters(), course.max_norm)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.last_step.skipped)
        if schedules:
            mpcore.step_scheduler(scheduler, optimizer.last_step)
    return Outcome(masters(model, optimizer), rates, skipped)


def clip_in_16_bits(optimizer: Any, model: nn.Module, max_norm: float) -> None:
    """What Accelerate does where nothing is scaled: it clips what is there."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a network on one of `batches`, in float32."""
    x, y = batch
    return nn.functional.mse_loss(model(x).float(), y)
