"""Small weights, a loss and the usual closure, for tests of optimizers that call closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.engines import Engine

SCALE = mpcore.DynamicLossScale(init=2.0**8, growth_interval=5)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TARGETS = [torch.linspace(-1, 2, 6) * k for k in (1.0, -0.5, 2.0)]

INNERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "LBFGS wolfe": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}


def make(
    engine: Engine, name: str = "SGD", scale: Any = SCALE
) -> tuple[list[nn.Parameter], mpcore.MixedPrecisionOptimizer]:
    params = [nn.Parameter(torch.linspace(0, 1, 6).to(dtype)) for dtype in DTYPES]
    return params, engine.wrap(INNERS[name](params), scale)


def loss_of(params: list[nn.Parameter]) -> Tensor:
    apart = [p.float() - t for p, t in zip(params, TARGETS[: len(params)], strict=True)]
    return torch.stack([(x.square() + x**4 / 16).sum() for x in apart]).sum()


def closure_of(
    optimizer: Any,
    params: list[nn.Parameter],
    before_backward: Callable[[int], float] = lambda evaluation: 1.0,
    calls: list[float] | None = None,
) -> Callable[[], Tensor]:
    """The usual closure; `before_backward` gets the evaluation's number and scales the loss."""
    calls = [] if calls is None else calls

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(params)
        calls.append(loss.item())
        optimizer.backward(loss * before_backward(len(calls)))
        return loss

    return closure


def patterns(tensor: Tensor) -> Any:
    return str(tensor.dtype), tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return patterns(value)
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def contents(params: list[nn.Parameter], optimizer: Any) -> Any:
    """Weights, masters, inner state and group options, as patterns; no state counts as empty."""
    states = [
        {k: flat(v) for k, v in optimizer.state.get(p, {}).items() if k != "master"} for p in params
    ]
    masters = [patterns(optimizer.state.get(p, {}).get("master", p).float()) for p in params]
    groups = [
        {
            k: list(map(id, v)) if k == "params" else flat(v)
            for k, v in group.items()
            if k != "mpcore"  # the wrapper's own
        }
        for group in optimizer.param_groups
    ]
    return [patterns(p) for p in params], masters, states, groups
