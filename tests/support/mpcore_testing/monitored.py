"""An optimizer with three parameters to watch, gradients for it, and what its monitor logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mpcore
import torch
from torch import nn

from mpcore_testing.engines import Engine

SCALE = mpcore.StaticLossScale(2.0**10)


def make(engine: Engine, scale: Any = SCALE) -> tuple[list[nn.Parameter], Any]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    params = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(d)) for d in dtypes]
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    return params, engine.wrap(torch.optim.AdamW(named, lr=0.01), scale)


def set_gradients(params: Any, optimizer: Any, seed: int, *, spread: float = 1.0) -> list[Any]:
    """Sets scaled gradients and returns them as float64, as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    scale = float(optimizer.scale(torch.ones(())))
    stored = []
    for param in params:
        noise = torch.randn(param.shape, generator=generator)
        noise = noise * (10.0 ** (-spread * torch.rand(param.shape, generator=generator)))
        noise.view(-1)[1] = 0.0
        param.grad = (noise * scale).to(param.dtype)
        stored.append(param.grad.double().numpy().copy())
    return stored


def overflow(params: Any, optimizer: Any, value: float = torch.inf) -> None:
    set_gradients(params, optimizer, 0)
    params[0].grad[1, 2] = value
    optimizer.step()
    optimizer.zero_grad()


class Keeping(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """Gives what monitors log in the meantime, from INFO on."""
    logger, handler = logging.getLogger("mpcore.monitor"), Keeping()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.records
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
