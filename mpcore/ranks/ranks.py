"""Which ranks act as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """The ranks whose loss is scaled by one loss scale: all skip a step, or none does.

    Each step has one small collective: in `clip_grad_norm_`, else in `step`. All ranks of the group
    have to call these alike, also one that has no gradient.

    Args:
        group: A `torch.distributed.ProcessGroup`; None: all ranks (WORLD).
        replicas: Who holds equal copies of parameters that are no DTensors. None: the whole group
            if all of it lists the same names and shapes (DistributedDataParallel), else nobody
            (stages of a pipeline). A process group: its ranks do, others have others. A mapping
            from name patterns (`fnmatch`) to process groups, or to None for "nobody": for experts
            beside layers that all have; what no pattern fits is the whole group's.

    Example:
        >>> Ranks()
        Ranks(group=None, replicas=None)
    """

    group: Any = None
    replicas: Any | Mapping[str, Any] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a process group cannot be copied, and a copy is of the same ranks
