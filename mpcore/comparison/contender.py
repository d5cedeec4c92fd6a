"""What a comparison trains: a policy with a loss scale, under a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.loss_scale import LossScale, check_loss_scale
from mpcore.precision import Policy

#: A policy or its name, or one of these with a loss scale.
Choice = str | Policy | tuple[str | Policy, LossScale]


@dataclass(frozen=True)
class Contender:
    """A policy with a loss scale.

    Attributes:
        label: What tables call it.
        policy: Types of parameters and arithmetic.
        loss_scale: How the loss is scaled.
    """

    label: str
    policy: Policy
    loss_scale: LossScale


BASELINE = Contender("float32", Policy("float32"), Policy("float32").loss_scale())


def contenders(choices: Sequence[Choice]) -> tuple[Contender, ...]:
    """Returns what is trained beside the baseline; no sync.

    Args:
        choices: At least one, no two alike.

    Raises:
        ArgumentTypeError: One is something else.
        ArgumentError: There is none, two are alike, or a name is unknown.

    Example:
        >>> from mpcore import StaticLossScale
        >>> [c.label for c in contenders(["float16", ("float16", StaticLossScale(8.0))])]
        ['float16', 'float16, StaticLossScale(scale=8.0)']
    """
    if isinstance(choices, (str, Policy)):
        raise ArgumentTypeError(
            f"policies: expected a list of policies, got {choices!r}. Write [{choices!r}]."
        )
    found = tuple(map(_contender, choices))
    labels = [BASELINE.label, *(one.label for one in found)]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice or not found:
        raise ArgumentError(
            f"policies: expected policies that differ from each other and from float32, which is "
            f"always there, got {list(choices)!r}."
        )
    return found


def _contender(choice: Choice) -> Contender:
    policy, scale = choice if isinstance(choice, tuple) and len(choice) == 2 else (choice, None)
    if isinstance(policy, str):
        policy = Policy(policy)
    if not isinstance(policy, Policy):
        raise ArgumentTypeError(
            "policies: expected names, mpcore.Policy or (policy, loss scale), got "
            f"{type(policy).__name__}."
        )
    label = policy.name
    if policy != Policy(policy.name):
        label = f"{label} -> {policy.output_dtype}".replace("torch.", "")
    if scale is None:
        return Contender(label, policy, policy.loss_scale())
    check_loss_scale(scale)
    return Contender(f"{label}, {scale}", policy, scale)
