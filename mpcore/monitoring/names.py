"""What parameters are called: by their model, else by their param groups."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_

from torch import Tensor, nn

from mpcore.engine import MixedPrecisionOptimizer
from mpcore.masters import names_of


class Names:
    """Names of parameters, made again only when param groups have changed.

    Args:
        optimizer: Whose.
        model: Its names come first.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1)
        >>> optimizer = MixedPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> Names(optimizer, model).current()(model.bias)
        'bias'
    """

    def __init__(self, optimizer: MixedPrecisionOptimizer, model: nn.Module | None) -> None:
        self._optimizer = optimizer
        self._of_model = {} if model is None else {id(p): n for n, p in model.named_parameters()}
        self._params: list[Tensor] = []
        self._given: list[list[str] | None] = []
        self._names: dict[int, str] = {}

    def current(self) -> Callable[[Tensor], str]:
        """Returns what names parameters, one of no group included."""
        groups = self._optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        given = [group.get("param_names") for group in groups]
        same = len(params) == len(self._params) and all(map(is_, params, self._params))
        if not same or given != self._given:
            self._params, self._given = params, [names and list(names) for names in given]
            self._names = {**names_of(groups), **self._of_model}
        names, search = self._names, self._optimizer._name_of

        def name_of(param: Tensor) -> str:
            return names.get(id(param)) or search(param)

        return name_of
