"""Ranks that skip, clip and move their loss scale as one: who they are, and what they agree on.

Start with `ranks.py`. Its face is what is imported here; its modules are its own.
"""

from __future__ import annotations

from mpcore.ranks.agreement import Agreed, Agreement
from mpcore.ranks.choice import (
    check_ranks,
    choose_agreement,
    find_replicated,
    group_of,
    latest_of,
    meshes_of,
    several_ranks,
    warn_alone,
    warn_scaler,
    widest_of,
)
from mpcore.ranks.collective import naming_failures, reduced
from mpcore.ranks.module_joins import ModuleJoins
from mpcore.ranks.ranks import Ranks

__all__ = [
    "Agreed",
    "Agreement",
    "ModuleJoins",
    "Ranks",
    "check_ranks",
    "choose_agreement",
    "find_replicated",
    "group_of",
    "latest_of",
    "meshes_of",
    "naming_failures",
    "reduced",
    "several_ranks",
    "warn_alone",
    "warn_scaler",
    "widest_of",
]
