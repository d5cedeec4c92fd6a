"""Ways to clip and step the same AdamW over the same gradients, each with tensors of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpcore.bench.problem import ADAMW, MAX_NORM, Problem
from mpcore.bench.tensors import tensors_in
from mpcore.engine import MixedPrecisionOptimizer
from mpcore.loss_scale import DynamicLossScale
from mpcore.monitoring.monitor import Monitor


class Contender(ABC):
    """One way to step, with tensors of its own.

    Args:
        problem: Weights and gradients.
        dtype: Of the parameters and their gradients.

    Attributes:
        params: The model's parameters; their gradients stay the same tensors.
        scaled: Whether `step` unscales.
        compiled: Whether `step` runs code of torch.compile.
    """

    scaled = True
    compiled = False

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.params = [nn.Parameter(w.to(dtype, copy=True)) for w in problem.weights]
        for param in self.params:
            param.grad = torch.zeros_like(param)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, to be filled before every step."""
        return [param.grad for param in self.params if param.grad is not None]

    @abstractmethod
    def before_step(self) -> None:
        """Does what a training loop does around backward, untimed."""

    @abstractmethod
    def step(self) -> None:
        """Unscales, clips, updates: what is timed."""

    @abstractmethod
    def weight(self, index: int) -> Tensor:
        """Returns a weight in the best precision that the row keeps."""

    @abstractmethod
    def state(self) -> Any:
        """Returns what is kept from step to step besides parameters and gradients."""

    def on_host(self) -> list[Tensor]:
        """Returns state that is on the host whatever the device; reading it waits for nothing."""
        return []

    def held(self) -> Iterable[Tensor]:
        """Yields every tensor that is kept from step to step."""
        yield from self.params
        yield from self.grads
        yield from tensors_in(self.state())


class Mpcore(Contender):
    """`MixedPrecisionOptimizer` around AdamW.

    Args:
        problem: Weights and gradients.
        dtype: Of the parameters.
        path: "fused" or "general".
        backend: As for `MixedPrecisionOptimizer`.
        every: Steps from one reading of a `Monitor` to the next; None: no monitor.
        on_weight_edit: As for `MixedPrecisionOptimizer`.
        masters: Likewise.
        moments: Likewise.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        path: Literal["fused", "general"],
        backend: Any,  # as typed on the command line: the optimizer checks it
        every: int | None = None,
        on_weight_edit: Literal["adopt", "always"] = "adopt",
        masters: Any = "float32",
        moments: Any = "float32",
    ) -> None:
        super().__init__(problem, dtype)
        # the general path calls this optimizer's own step: give it the fastest one there is
        inner = torch.optim.AdamW(self.params, **ADAMW, fused=path == "general")
        scale = DynamicLossScale(init=problem.scale)
        self._optimizer = MixedPrecisionOptimizer(
            inner,
            scale,
            path=path,
            backend=backend,
            on_weight_edit=on_weight_edit,
            masters=masters,
            moments=moments,
        )
        self._monitor = None if every is None else Monitor(self._optimizer, every=every)
        self._loss = torch.zeros((), device=problem.device)

    def before_step(self) -> None:
        """Scales a loss."""
        self._optimizer.scale(self._loss)

    def step(self) -> None:
        """Clips and steps; unscaling is part of the step."""
        self._optimizer.clip_grad_norm_(MAX_NORM)
        self._optimizer.step()

    def weight(self, index: int) -> Tensor:
        """Returns the master, the weight itself where there is none."""
        param = self.params[index]
        if self._optimizer.masters == "none":
            return param.detach()
        master: Tensor = self._optimizer.float32_state(param)["master"]
        return master

    def state(self) -> Any:
        """Returns what lies beside weights, and moments."""
        return [self._optimizer.state[param] for param in self.params]


class TorchAmp(Contender):
    """FP32 parameters, `torch.amp.GradScaler`, and torch's AdamW.

    Args:
        problem: Weights and gradients.
        fused: Whether AdamW is the fused one; otherwise it is the foreach one.
    """

    def __init__(self, problem: Problem, fused: bool) -> None:
        super().__init__(problem, torch.float32)
        self._fused = fused
        self._optimizer = torch.optim.AdamW(self.params, **ADAMW, fused=fused, foreach=not fused)
        self._scaler = torch.amp.GradScaler(problem.device.type, init_scale=problem.scale)
        self._loss = torch.zeros((), device=problem.device)

    def before_step(self) -> None:
        """Scales a loss."""
        self._scaler.scale(self._loss)

    def step(self) -> None:
        """Unscales, clips, steps, moves the scale."""
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def weight(self, index: int) -> Tensor:
        """Returns the parameter."""
        return self.params[index].detach()

    def state(self) -> Any:
        """Returns the moments."""
        return [self._optimizer.state[param] for param in self.params]

    def on_host(self) -> list[Tensor]:
        """Returns the step counts, which foreach keeps on the host."""
        counts = [self._optimizer.state[param]["step"] for param in self.params]
        return [] if self._fused else counts


class MastersLoop(Contender):
    """The loop that users write: FP32 copies, gradients widened, torch's fused AdamW, copied back.

    Args:
        problem: Weights and gradients.
        dtype: Of the model's parameters.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        self._inverse_scale = 1 / problem.scale
        self._masters = [nn.Parameter(param.detach().float()) for param in self.params]
        for master in self._masters:
            master.grad = torch.zeros_like(master)  # kept: cheaper than a fresh one every step
        self._optimizer = torch.optim.AdamW(self._masters, **ADAMW, fused=True)

    def before_step(self) -> None:
        """Does nothing: the scale is a number."""

    @torch.no_grad()
    def step(self) -> None:
        """Widens, unscales, clips, asks whether to skip, steps, copies back."""
        wide = [master.grad for master in self._masters if master.grad is not None]
        for grad32, grad in zip(wide, self.grads, strict=True):
            grad32.copy_(grad)
            grad32.mul_(self._inverse_scale)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, MAX_NORM)
        if not torch.isfinite(norm):
            return
        self._optimizer.step()
        for param, master in zip(self.params, self._masters, strict=True):
            param.copy_(master)

    def weight(self, index: int) -> Tensor:
        """Returns the master."""
        return self._masters[index].detach()

    def state(self) -> Any:
        """Returns masters, their gradients and moments."""
        grads = [master.grad for master in self._masters]
        return [*self._masters, grads, [self._optimizer.state[m] for m in self._masters]]
