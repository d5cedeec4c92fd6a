"""Every class in `torch.optim` that takes dense gradients, with the options worth a test.

The classes are found by looking into `torch.optim`, so that a new one is noticed: `uncovered`
names it until `OPTIONS` has an entry for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: no gradient of theirs is dense, or they are no algorithm
NOT_DENSE = {"Optimizer", "SparseAdam"}

#: Per class, option sets. `foreach=True` and `fused=True` are added where the class has them.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"lr": 0.1, "t0": 20.0, "weight_decay": 0.01}],
    "Adadelta": [{"lr": 1.0, "weight_decay": 0.01}, {"lr": 1.0, "maximize": True}],
    "Adafactor": [{"lr": 0.05, "weight_decay": 0.01}],
    # a start value that 16 bits can hold: this state exists before the masters do
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.01}, {"lr": 0.1, "initial_accumulator_value": 0.25}],
    "Adam": [{"lr": 0.02, "weight_decay": 0.01}, {"lr": 0.02, "amsgrad": True}],
    "AdamW": [
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": 0.02, "amsgrad": True, "maximize": True},
        {"lr": 0.02, "betas": (0.0, 0.5)},
    ],
    "Adamax": [{"lr": 0.02, "weight_decay": 0.01}],
    "LBFGS": [
        {"lr": 0.5, "max_iter": 4, "history_size": 3},
        {"lr": 1.0, "max_iter": 5, "history_size": 4, "line_search_fn": "strong_wolfe"},
    ],
    "Muon": [{"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.02, "nesterov": False}],
    "NAdam": [{"lr": 0.02, "weight_decay": 0.01, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.02, "weight_decay": 0.01, "decoupled_weight_decay": True}],
    "RMSprop": [{"lr": 0.02, "centered": True, "momentum": 0.9, "weight_decay": 0.01}],
    "Rprop": [{"lr": 0.02}],
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
}
MATRICES_ONLY = {"Muon"}
NEEDS_CLOSURE = {"LBFGS"}


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options.

    Attributes:
        name: Its name in `torch.optim`.
        options: Keyword arguments.
    """

    name: str
    options: dict[str, Any]

    def build(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Returns the optimizer over `params`, tensors or groups."""
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self.name)(params, **self.options)
        return optimizer

    @property
    def matrices_only(self) -> bool:
        """Whether every parameter must be two-dimensional."""
        return self.name in MATRICES_ONLY

    @property
    def on_device(self) -> bool:
        """Whether the optimizer takes `found_inf` and so needs no host sync to skip a step."""
        return bool(self.options.get("fused"))

    @property
    def starts_together(self) -> bool:
        """Whether all first gradients must come in one step: torch's fused SGD with momentum
        refuses a parameter without a momentum buffer beside one that has it.
        """
        return self.name == "SGD" and self.on_device and bool(self.options.get("momentum"))

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})"


def dense_classes() -> set[str]:
    """Returns the names of all classes in `torch.optim` that take dense gradients."""
    found = {
        name
        for name, member in vars(torch.optim).items()
        if isinstance(member, type) and issubclass(member, torch.optim.Optimizer)
    }
    return found - NOT_DENSE


def uncovered() -> set[str]:
    """Returns the names of the dense classes that have no entry in `OPTIONS`."""
    return dense_classes() - OPTIONS.keys()


def cases(names: Iterable[str] | None = None) -> list[Case]:
    """Returns the cases of the named classes, by default of all that this torch has."""
    result = []
    for name in sorted(dense_classes() & OPTIONS.keys() if names is None else names):
        known = inspect.signature(getattr(torch.optim, name)).parameters
        for options in OPTIONS[name]:
            result.append(Case(name, options))
            for way in ("foreach", "fused"):
                if way in known:
                    result.append(Case(name, {**options, way: True}))
    return result


def step_cases() -> list[Case]:
    """Returns the cases of optimizers that step without a closure."""
    return [case for case in cases() if case.name not in NEEDS_CLOSURE]


def fused_cases() -> list[Case]:
    """Returns the cases of optimizers that take `found_inf`."""
    return [case for case in cases() if case.on_device]
