"""Loss scales as values, the one rule by which each moves, and their state on a device.

Start with `kind.py`: what a loss scale is. Its face is what is imported here.
"""

from __future__ import annotations

from mpcore.loss_scale.alarm import SkipAlarm
from mpcore.loss_scale.dynamic import AT_MIN, REFILLS, DynamicLossScale, tolerated
from mpcore.loss_scale.fixed import NoLossScale, StaticLossScale
from mpcore.loss_scale.headroom import HeadroomLossScale
from mpcore.loss_scale.kind import (
    LossScale,
    check_loss_scale,
    initial_state,
    next_state,
    resumed_state,
)
from mpcore.loss_scale.losses import Losses, ScaledLoss, new_alarm
from mpcore.loss_scale.move import ScaleMove, count_step_, update_scale_
from mpcore.loss_scale.outputs import scale_outputs
from mpcore.loss_scale.state import COMPARABLE_STEPS, COUNTERS, LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors, counter

__all__ = [
    "AT_MIN",
    "COMPARABLE_STEPS",
    "COUNTERS",
    "REFILLS",
    "DynamicLossScale",
    "HeadroomLossScale",
    "LossScale",
    "LossScaleState",
    "LossScaleTensors",
    "Losses",
    "NoLossScale",
    "ScaleMove",
    "ScaledLoss",
    "SkipAlarm",
    "StaticLossScale",
    "check_loss_scale",
    "count_step_",
    "counter",
    "initial_state",
    "new_alarm",
    "next_state",
    "resumed_state",
    "scale_outputs",
    "tolerated",
    "update_scale_",
]
