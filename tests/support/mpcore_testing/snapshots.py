"""Everything that a step could change, copied, to be compared with what is there afterwards."""

from __future__ import annotations

import copy
from typing import Any

import mpcore
import torch
from torch import Tensor, nn


def model_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the optimizer's parameters, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns the optimizer's groups without their parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def snapshot(optimizer: mpcore.MixedPrecisionOptimizer) -> dict[str, Any]:
    """Returns copies of what a skipped step must leave alone; compare two with `same_bits`.

    Weights, masters, optimizer state (as the wrapper shows it and as the wrapped optimizer has it),
    group options, 16-bit gradients, the count of clamped weights and the random number generator.
    The loss scale, its counters and float32 gradients, which are unscaled in place, are not in it.
    """
    params = model_params(optimizer)
    keys = [optimizer.state.get(p, {}).get("master", p) for p in params]
    kept = {
        "weights": [p.detach() for p in params],
        "state": [dict(optimizer.state.get(p, {})) for p in params],
        "inner state": [dict(optimizer.inner.state.get(key, {})) for key in keys],
        "number of states": len(optimizer.inner.state),
        "options": group_options(optimizer),
        "gradients": [p.grad for p in params if p.dtype != torch.float32],
        "saturated": optimizer.saturated,
        "generator": torch.get_rng_state(),
    }
    return copied(kept)


def copied(value: Any) -> Any:
    """Returns a deep copy; of tensors much faster than `copy.deepcopy`, which copies storages."""
    kind = type(value)
    if kind in (Tensor, nn.Parameter):
        return value.detach().clone()
    if kind is dict:
        return {key: copied(each) for key, each in value.items()}
    if kind in (list, tuple):
        return kind(map(copied, value))
    return copy.deepcopy(value)
