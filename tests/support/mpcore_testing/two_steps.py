"""A sharpness-aware optimizer and a loss, wrapped over 16 bits and plain over float32 copies."""

from __future__ import annotations

from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.bits import rounded, same_bits
from mpcore_testing.engines import Engine

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALE = mpcore.DynamicLossScale(2.0**10, growth_interval=4)
INF = float("inf")


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimization around SGD with momentum, as it is commonly written."""

    def __init__(self, params: Any, lr: float = 0.02, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups
        self.clears = "None"

    def clear(self) -> None:
        """Clears gradients, in one of the ways in which people do."""
        if self.clears == "data":
            for param in self._all():
                param.grad.data.zero_()
        else:
            self.zero_grad(set_to_none=self.clears == "None")

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        grads = [p.grad.norm() for p in self._all() if p.grad is not None]
        norm = torch.stack(grads).norm()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["old"] = param.detach().clone()
                    param.add_(param.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.clear()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> str:
        for param in self._all():
            if param.grad is not None:
                param.data = self.state[param]["old"]
        self.base.step()
        if zero_grad:
            self.clear()
        return "stepped"

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            self.first_step(zero_grad=True)
            closure()
            self.second_step()

    def _all(self) -> list[Any]:
        return [param for group in self.param_groups for param in group["params"]]


class Twins:
    """A wrapped one over parameters of three dtypes, and a plain one over float32 copies.

    The gradient is a function of the weights, that of `loss`, so that the climb matters.
    """

    def __init__(self, engine: Engine, scale: Any = SCALE) -> None:
        values = torch.linspace(-1, 1, 12).view(3, 4)
        self.params = [nn.Parameter(value.to(d)) for value, d in zip(values, DTYPES, strict=True)]
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.optimizer: Any = engine.wrap(Sharp(self.params), scale)
        self.plain = Sharp(self.copies)

    def backward(self, batch: int, *, overflow: bool = False) -> None:
        self.optimizer.backward(loss(self.params, batch))
        if overflow:
            assert self.params[1].grad is not None
            self.params[1].grad[0] = INF

    def step(self, batch: int, *, clear: bool, overflow: int = 0) -> None:
        """One step of both, the plain one only if no pass overflows."""
        self.backward(batch, overflow=overflow == 1)
        self.optimizer.first_step(zero_grad=clear)
        if not clear:
            self.optimizer.zero_grad()
        self.backward(batch, overflow=overflow == 2)
        result = self.optimizer.second_step(zero_grad=True)
        assert result == (None if overflow else "stepped")
        self.optimizer.zero_grad()
        if not overflow:
            loss(self.copies, batch).backward()
            self.plain.first_step(zero_grad=True)
            loss(self.copies, batch).backward()
            self.plain.second_step(zero_grad=True)

    def masters(self) -> list[Tensor]:
        return [self.optimizer.state[p].get("master", p).detach().clone() for p in self.params]

    def expect_close(self, bound: float = 5e-3) -> None:
        for param, master, other in zip(self.params, self.masters(), self.copies, strict=True):
            assert (master - other).abs().max() <= bound
            assert same_bits(param.detach(), rounded(master, param.dtype))


def loss(params: Any, batch: int) -> Any:
    target = torch.linspace(1, -1, 4) * (1 + batch % 3)
    apart = [(p.float() - target) for p in params]
    return torch.stack([(x.square() + x**4 / 8).mean() for x in apart]).sum()
