"""What only fused updates can step: compact moments, and weights without masters.

An optimizer's own step would have to be given both in float32 for its length, and what it makes of
them rounded again: that is refused, by name, and not done behind anybody's back.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpcore.errors import ArgumentError

#: The backends that fuse updates of masters and moments that are no float32 tensors.
PACKING = ("reference", "compiled")


def check_fused(kept: str, asked: str, backend: str, reasons: Sequence[str | None]) -> None:
    """Raises `ArgumentError` unless every param group has a fused step.

    Args:
        kept: What needs one, as it was asked for.
        asked: The path that was asked for.
        backend: Its name.
        reasons: Per group why its step cannot be fused, or None.

    Example:
        >>> check_fused('moments="int8"', "auto", "compiled", [None, None])
    """
    if backend not in PACKING:
        names = " and ".join(f'"{name}"' for name in PACKING)
        raise ArgumentError(
            f"{kept}: expected one of the backends {names}, which step it, got {backend!r}. Pass "
            'masters="split" or "float32" and moments="float32" with that one.'
        )
    if asked == "general":
        raise ArgumentError(
            f'{kept}: expected path="auto" or "fused", got "general". An optimizer\'s own step '
            'does not know it; pass masters="split" or "float32" and moments="float32" to take it.'
        )
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise ArgumentError(
                f"{kept}: expected param groups whose steps are fused, got param group {number}: "
                f'{reason}. Pass masters="split" or "float32" and moments="float32", or an '
                "optimizer that docs/fused.md names."
            )


def check_no_call(kept: str | None) -> None:
    """Raises `ArgumentError` if a method of the wrapped optimizer would not know its state.

    Args:
        kept: As for `check_fused`; None: every method knows it.
    """
    if kept is not None:
        raise ArgumentError(
            f"{kept}: expected no call of methods of the wrapped optimizer, which does not know "
            'it. Pass masters="split" or "float32" and moments="float32".'
        )
