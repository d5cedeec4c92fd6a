"""Fused updates: which optimizers have one, and what each computes."""

from __future__ import annotations

from mpcore.updates.adagrad import AdagradRule
from mpcore.updates.adam import AdamRule
from mpcore.updates.batch import Batch, Hyper, shared_base
from mpcore.updates.lion import LionRule
from mpcore.updates.rule import UpdateRule, power
from mpcore.updates.sgd import SGDRule
from mpcore.updates.square_root import sqrt64

__all__ = ["RULES", "Batch", "Hyper", "UpdateRule", "power", "rule_of", "shared_base", "sqrt64"]

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
