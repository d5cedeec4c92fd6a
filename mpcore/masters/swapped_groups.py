"""Param groups that hold other tensors for a while: masters, or the model's parameters again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def swapped(groups: list[dict[str, Any]], contents: Iterable[list[Tensor]]) -> Iterator[None]:
    """Puts tensors in the place of the parameters in param groups, and these back in the end.

    The lists are changed in place, since some optimizers (LBFGS) keep the list itself.

    Args:
        groups: Param groups of an optimizer.
        contents: The tensors of each.
    """
    lists = [group["params"] for group in groups]
    before = [list(params) for params in lists]
    try:
        for params, content in zip(lists, list(contents), strict=True):
            params[:] = content
        yield
    finally:
        for params, content in zip(lists, before, strict=True):
            params[:] = content
