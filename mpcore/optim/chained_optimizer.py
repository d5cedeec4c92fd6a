"""Several optimizers as one: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from mpcore.errors import ArgumentError, ArgumentTypeError


class ChainedOptimizer(torch.optim.Optimizer):
    """Steps several optimizers one after the other, as one; syncs as they do.

    Its param groups are theirs, the very dictionaries, in the order in which they are given, and
    they share one `state`: LR schedulers over it or over one of them drive the same groups.
    Wrapped in a `MixedPrecisionOptimizer`, each group takes the path that it would take alone: an
    AdamW beside a Muon is fused, under one loss scale, one norm and one decision to skip.

    Args:
        optimizers: At least one, none of which needs a closure. Leave their own `step` alone from
            now on, and add no groups to them.

    Raises:
        ArgumentTypeError: One is no `torch.optim.Optimizer`.
        ArgumentError: None is given, one is itself a chain or needs a closure, a parameter is in
            two of them, or only some know the names of their parameters.

    Example:
        >>> import mpcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).half()
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> others = [p for p in model.parameters() if p.ndim != 2]
        >>> optimizer = mpcore.MixedPrecisionOptimizer(
        ...     ChainedOptimizer(torch.optim.Muon(matrices), torch.optim.AdamW(others))
        ... )
        >>> [str(path) for path in optimizer.path]
        ['general: no fused update for Muon', 'fused: AdamW']
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        _check(optimizers)
        # torch's constructor copies the groups that it is given; the shared ones replace them
        super().__init__([{"params": []}], {})
        self.optimizers = optimizers
        #: names of options are all that is asked of it: values are in the groups
        self.defaults = {name: v for part in optimizers for name, v in part.defaults.items()}
        self.param_groups = [group for part in optimizers for group in part.param_groups]
        state = defaultdict(dict, {k: v for part in optimizers for k, v in part.state.items()})
        self.state = state
        self.linked()

    def linked(self) -> tuple[torch.optim.Optimizer, ...]:
        """Returns the optimizers, over the state of now; no host sync.

        Raises:
            ArgumentError: One has other groups than those that the chain was made of.
        """
        owned = [group for part in self.optimizers for group in part.param_groups]
        if list(map(id, owned)) != list(map(id, self.param_groups)):
            raise ArgumentError(
                "ChainedOptimizer: expected the param groups that it was made of, got others in "
                "it or in one of its optimizers. Make a chain of optimizers that have all groups."
            )
        for part in self.optimizers:
            part.state = self.state
        return self.optimizers

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises an ArgumentError: nobody could say which of the optimizers it is for."""
        if not hasattr(self, "optimizers"):  # torch's constructor
            super().add_param_group(param_group)
            return
        raise ArgumentError(
            "ChainedOptimizer.add_param_group: expected all groups from the start, got one more, "
            "and no word of which optimizer is to step it. Make a chain of optimizers that have "
            "all groups."
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps each optimizer, in order.

        Args:
            closure: Computes the loss again and returns it; evaluated once, before the first.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.linked():
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the optimizers stay the same objects."""
        parts = self.optimizers
        super().load_state_dict(state_dict)  # which calls `__setstate__`
        for part, filled in zip(parts, self.optimizers, strict=True):
            part.param_groups = filled.param_groups
        self.optimizers = parts
        self.linked()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizers" not in state:  # groups and state alone: each fills in what it misses
            self.optimizers = tuple(self._over_new_groups())
        self.linked()

    def _over_new_groups(self) -> list[torch.optim.Optimizer]:
        """Returns copies of the optimizers that have the groups and the state of now."""
        copies, rest = [], list(self.param_groups)
        for part in self.optimizers:
            groups = rest[: len(part.param_groups)]
            del rest[: len(groups)]
            copy = type(part).__new__(type(part))
            copy.__dict__.update(part.__dict__)
            copy.__setstate__({"state": self.state, "param_groups": groups})
            copies.append(copy)
        return copies


def _check(optimizers: tuple[object, ...]) -> None:
    """Raises unless these can be stepped as one."""
    if not optimizers:
        raise ArgumentError("ChainedOptimizer: expected at least one optimizer, got none.")
    seen: set[torch.Tensor] = set()
    named: set[bool] = set()
    for part in optimizers:
        if not isinstance(part, torch.optim.Optimizer):
            raise ArgumentTypeError(
                f"ChainedOptimizer: expected torch.optim.Optimizers, got {type(part).__name__}. "
                "Pass the objects one after the other: ChainedOptimizer(muon, adamw)."
            )
        if isinstance(part, ChainedOptimizer):
            raise ArgumentError(
                "ChainedOptimizer: expected optimizers, got a chain of them. Pass those that it "
                "holds: ChainedOptimizer(*chain.optimizers, other)."
            )
        closure = inspect.signature(part.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ArgumentError(
                f"ChainedOptimizer: expected optimizers that step without a closure, got "
                f"{type(part).__name__}, which needs one. Give it an optimizer of its own."
            )
        params = [param for group in part.param_groups for param in group["params"]]
        if not seen.isdisjoint(params):
            raise ArgumentError(
                "ChainedOptimizer: expected every parameter in one optimizer, got one that two "
                "hold. Leave it out of one of them."
            )
        seen.update(params)
        named.update("param_names" in group for group in part.param_groups)
    if len(named) > 1:
        raise ArgumentError(
            "ChainedOptimizer: expected names of all parameters or of none, got optimizers of "
            "both kinds. Make all of them from (name, parameter) pairs."
        )
