"""What a `state_dict` of torch's lacks: hooks that see to it before and after it is made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpcore.checkpoint import SECTION, new_section, sums_section
from mpcore.errors import StageError


def take_over_edits(optimizer: Any) -> None:
    """A hook before `state_dict`: a state that somebody replaced has its masters back."""
    optimizer._check_between_steps("state_dict()")
    optimizer._masters.take_over_edits(optimizer.state, optimizer.param_groups)
    known = set(map(id, optimizer._params()))
    for key in optimizer.state:
        if isinstance(key, Tensor) and id(key) not in known:
            raise StageError(
                "state_dict(): expected the state of parameters in param groups, got that of one "
                f"of shape {list(key.shape)} in none. Put the parameter into a group, or delete "
                "its entry from optimizer.state."
            )


def add_section(optimizer: Any, saved: dict[str, Any]) -> None:
    """A hook of `state_dict`: adds what torch's does not know of; syncs with the host."""
    section = new_section(optimizer._scale.to_state(), optimizer.saturated, optimizer._losses)
    for group in saved["param_groups"]:
        group[SECTION] = section
    accumulated = optimizer._stage.accumulated
    if accumulated is not None:
        section = {**section, "accumulated": sums_section(accumulated, optimizer._params())}
    saved[SECTION] = section
