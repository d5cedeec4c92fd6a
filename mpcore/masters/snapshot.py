"""What a step may have to be undone to: parameters, masters, and the inner optimizer's state."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mpcore.masters.masters import Masters


class Snapshot:
    """Parameters, masters, inner state and group options before a step with a closure."""

    def __init__(self, inner: torch.optim.Optimizer, masters: Masters) -> None:
        self._inner = inner
        params = [p for group in inner.param_groups for p in group["params"]]
        beside = [masters.held.lies_in(param, master) for param, master in masters.items()]
        tensors = [*params, *beside]
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._state = {key: copy.deepcopy(value) for key, value in inner.state.items()}
        self._options = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in inner.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back in place."""
        for tensor, value in self._values:
            tensor.copy_(value)
        self._inner.state.clear()
        self._inner.state.update(self._state)
        for group, options in zip(self._inner.param_groups, self._options, strict=True):
            for key, value in options.items():
                if isinstance(value, Tensor) and isinstance(group[key], Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
