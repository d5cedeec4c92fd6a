"""Names for profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

#: What names what is done within, at little cost while nobody listens; private to torch, None
#: where torch is older than 2.2.
CHEAP_LABEL: Any = getattr(torch._C._profiler, "_RecordFunctionFast", None)


def label(name: str) -> AbstractContextManager[Any]:
    """Returns a context that profilers show under a name; no host sync.

    Example:
        >>> with torch.profiler.profile() as found, label("mpcore.example"):
        ...     _ = torch.ones(2)
        >>> "mpcore.example" in [event.key for event in found.key_averages()]
        True
    """
    if CHEAP_LABEL is None:
        return torch.autograd.profiler.record_function(name)
    here: AbstractContextManager[Any] = CHEAP_LABEL(name)
    return here
