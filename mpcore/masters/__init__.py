"""FP32 masters: who has one, its state, edits of weights, and what a fused step is planned for.

Start with `masters.py`. Its face is what is imported here.
"""

from __future__ import annotations

from mpcore.masters.held_masters import MASTER_KEYS, HeldMasters
from mpcore.masters.held_moments import RANDOM_KEY, HeldMoments, check_moments, scales_of
from mpcore.masters.inner_guards import CheckpointGuard, DirectStepGuard
from mpcore.masters.masters import Groups, Masters
from mpcore.masters.packed_masters import check_store, hold_masters
from mpcore.masters.parameters import (
    check_can_be_stepped,
    check_group,
    check_inner,
    check_original,
    check_shared,
    name_of,
    names_of,
)
from mpcore.masters.scales import cover_rows
from mpcore.masters.snapshot import Snapshot
from mpcore.masters.step_plan import StepPlan, make_plan
from mpcore.masters.sums import Accumulated, MicroBatch, Overflow
from mpcore.masters.upcast import upcast
from mpcore.masters.weight_edits import WeightEdits, check_rule
from mpcore.masters.weights import overwrite, stale_weights, take_weights
from mpcore.masters.writes import Writes

__all__ = [
    "MASTER_KEYS",
    "RANDOM_KEY",
    "Accumulated",
    "CheckpointGuard",
    "DirectStepGuard",
    "Groups",
    "HeldMasters",
    "HeldMoments",
    "Masters",
    "MicroBatch",
    "Overflow",
    "Snapshot",
    "StepPlan",
    "WeightEdits",
    "Writes",
    "check_can_be_stepped",
    "check_group",
    "check_inner",
    "check_moments",
    "check_original",
    "check_rule",
    "check_shared",
    "check_store",
    "cover_rows",
    "hold_masters",
    "make_plan",
    "name_of",
    "names_of",
    "overwrite",
    "scales_of",
    "stale_weights",
    "take_weights",
    "upcast",
]
