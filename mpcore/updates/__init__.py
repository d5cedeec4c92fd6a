"""Fused updates: which optimizers have one, and what each computes."""

from __future__ import annotations

import torch

from mpcore.optim import ChainedOptimizer
from mpcore.updates.adagrad import AdagradRule
from mpcore.updates.adam import AdamRule
from mpcore.updates.batch import Batch, Hyper, shared_base
from mpcore.updates.lion import LionRule
from mpcore.updates.rule import UpdateRule, power
from mpcore.updates.sgd import SGDRule
from mpcore.updates.square_root import sqrt64

__all__ = [
    "RULES",
    "Batch",
    "Hyper",
    "UpdateRule",
    "parts_of",
    "power",
    "rule_of",
    "rules_of",
    "shared_base",
    "sqrt64",
]

#: Every rule by its name. A new optimizer is one file with a rule, and one entry here.
RULES: dict[str, UpdateRule] = {
    rule.name: rule for rule in (AdamRule(), SGDRule(), AdagradRule(), LionRule())
}


def rule_of(optimizer: object) -> UpdateRule | None:
    """Returns the rule for an optimizer of exactly one of the known types, or None.

    A subclass may have changed the step, so it has no rule.

    Example:
        >>> import torch
        >>> rule_of(torch.optim.AdamW([torch.zeros(2)])).name
        'adam'
    """
    for rule in RULES.values():
        if type(optimizer) in rule.optimizers:
            return rule
    return None


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Returns the optimizers that a chain steps, another one alone; groups in the same order.

    Raises:
        ArgumentError: Groups were added to one in a chain.
    """
    # a subclass may have changed the step
    chain = type(optimizer) is ChainedOptimizer
    return optimizer.linked() if chain else (optimizer,)  # type: ignore[attr-defined]


def rules_of(optimizer: torch.optim.Optimizer) -> list[UpdateRule | None]:
    """Returns the rule of each param group.

    Example:
        >>> import torch
        >>> sgd, own = torch.optim.SGD([torch.zeros(2)]), torch.optim.Rprop([torch.zeros(2)])
        >>> [rule and rule.name for rule in rules_of(ChainedOptimizer(sgd, own))]
        ['sgd', None]
    """
    return [rule_of(part) for part in parts_of(optimizer) for _ in part.param_groups]
