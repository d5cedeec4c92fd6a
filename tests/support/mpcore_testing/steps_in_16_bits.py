"""One step of a model in 16 bits beside the same step in FP32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mpcore
import torch
from torch import Tensor, nn

from mpcore_testing.zoo import Row

HALF = [torch.float16, torch.bfloat16]
#: What outputs, and what gradients, may be off, in roundings (eps), as a norm beside that of FP32.
#: Measured over the rows of the zoo: outputs 1.0 at most, gradients 1.3.
OUTPUTS, GRADIENTS = 2, 2


def check(
    build: Callable[[], Row], dtype: torch.dtype, rehearsed: bool, gradients: float = GRADIENTS
) -> None:
    """Asserts that results, gradients and buffers of a step are those of FP32 but for roundings.

    Args:
        build: Makes the model; weights are rounded first, so that what differs is arithmetic.
        dtype: What the model is cast to.
        rehearsed: Whether the cast gets the batch.
        gradients: How many roundings the gradients may be off.
    """
    torch.manual_seed(0)
    row = build()
    with torch.no_grad():
        for param in row.model.parameters():
            param.copy_(param.to(dtype))
    model, plain = row.model, copy.deepcopy(row.model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scale = mpcore.DynamicLossScale(2.0**10) if dtype == torch.float16 else mpcore.NoLossScale()
    optimizer = mpcore.MixedPrecisionOptimizer(inner, scale)
    given = row.batch if rehearsed else None
    mpcore.cast_model(model, dtype, optimizer, batch=given)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):  # the second with what the first has written to buffers
        result, expected = model(**row.batch), plain(**row.batch)
        assert close(first_of(result), first_of(expected), OUTPUTS, dtype)
        optimizer.zero_grad()
        other.zero_grad()
        optimizer.backward(row.loss(result))
        row.loss(expected).backward()
        optimizer.unscale_()
        pairs = list(zip(model.named_parameters(), plain.parameters(), strict=True))
        both = [(a.grad, b.grad) for (_, a), b in pairs]
        assert [a is None for a, _ in both] == [b is None for _, b in both]
        ours, theirs = (flat(each) for each in zip(*both, strict=True))
        assert close(ours, theirs, gradients, dtype)
    optimizer.step()
    other.step()
    assert not optimizer.last_step.skipped
    assert_buffers_close(model, plain, dtype)


def of_torch(build: Callable[[], Row], dtype: torch.dtype) -> float:
    """How many roundings gradients are off where torch alone casts the model, on this machine."""
    torch.manual_seed(0)
    row = build()
    with torch.no_grad():
        for param in row.model.parameters():
            param.copy_(param.to(dtype))
    plain = copy.deepcopy(row.model)
    cast = row.model.to(dtype)
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    (row.loss(cast(**row.batch)) * scale).backward()
    row.loss(plain(**row.batch)).backward()
    ours, theirs = (flat([p.grad for p in each.parameters()]) for each in (cast, plain))
    return float((ours / scale - theirs).norm() / theirs.norm() / torch.finfo(dtype).eps)


def flat(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([grad.flatten().float() for grad in gradients if grad is not None])


def first_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    values = result.values() if hasattr(result, "values") else result
    return next(v for v in values if isinstance(v, Tensor) and v.dim() > 0)


def close(ours: Tensor, theirs: Tensor, roundings: float, dtype: torch.dtype) -> bool:
    error = (ours.float() - theirs).norm() / theirs.norm()
    return bool(error <= roundings * torch.finfo(dtype).eps)


def assert_buffers_close(model: nn.Module, plain: nn.Module, dtype: torch.dtype) -> None:
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        if theirs.is_floating_point() and bool((theirs > -65504).all()):
            assert close(ours.float(), theirs, OUTPUTS, dtype), name
