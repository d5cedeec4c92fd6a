"""Every variant of every kernel that a launcher can use: what the audit compiles."""

from __future__ import annotations

from mpcore_kernels import adopt, cast, inspection, scale, unscale, update
from mpcore_kernels._launch import Variant


def variants() -> list[Variant]:
    """Returns the variants of all kernel modules, in the order in which the audit shows them.

    Example:
        >>> [variant.name for variant in variants()][:2]
        ['unscale fp16 fp16', 'unscale bf16 bf16']
    """
    modules = (unscale, cast, adopt, inspection, scale, update)
    return [variant for module in modules for variant in module.variants()]
