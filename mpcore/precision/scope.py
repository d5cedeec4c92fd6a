"""The global policy: a default for whoever asks for it, held in one context variable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mpcore.errors import ArgumentTypeError
from mpcore.precision.policy import Policy

_GLOBAL_POLICY: ContextVar[Policy] = ContextVar("mpcore_policy")


def set_global_policy(policy: Policy | str) -> None:
    """Makes `policy` what `global_policy()` returns, in this thread and its async tasks; no sync.

    Nothing changes in models that exist: apply it, `global_policy().apply(model)`. A thread starts
    from "float32" (Python up to 3.13).

    Args:
        policy: A `Policy`, or the name of one.

    Raises:
        ArgumentTypeError: It is neither.
        ArgumentError: No policy has that name.

    Example:
        >>> import mpcore
        >>> mpcore.set_global_policy("mixed_bfloat16")
        >>> mpcore.global_policy().compute_dtype
        torch.bfloat16
        >>> mpcore.set_global_policy("float32")
    """
    _GLOBAL_POLICY.set(_as_policy(policy))


def global_policy() -> Policy:
    """Returns the policy that `set_global_policy` or `use_policy` set last, or "float32"; no sync.

    Example:
        >>> import mpcore
        >>> mpcore.global_policy().name
        'float32'
    """
    return _GLOBAL_POLICY.get(Policy("float32"))


@contextmanager
def use_policy(policy: Policy | str) -> Iterator[Policy]:
    """Makes `policy` the global one inside a `with`, and then the one before it again; no sync.

    Args:
        policy: A `Policy`, or the name of one.

    Raises:
        ArgumentTypeError: It is neither.
        ArgumentError: No policy has that name.

    Example:
        >>> import mpcore
        >>> with mpcore.use_policy("float16") as policy:
        ...     mpcore.global_policy() is policy
        True
        >>> mpcore.global_policy().name
        'float32'
    """
    token = _GLOBAL_POLICY.set(_as_policy(policy))
    try:
        yield global_policy()
    finally:
        _GLOBAL_POLICY.reset(token)


def _as_policy(policy: object) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return Policy(policy)
    raise ArgumentTypeError(
        f"policy: expected a Policy or the name of one, got {type(policy).__name__}."
    )
