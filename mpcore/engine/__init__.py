"""The course of a step, from the scaled loss to the rounded weight, and the optimizer around it.

Start with `optimizer.py`, then `stage.py`. Its face is what is imported here.
"""

from __future__ import annotations

from mpcore.engine.drivers import is_unscaled, tell_losses, unscale_by, unwrapped, watch_clips
from mpcore.engine.gradient_buckets import Look
from mpcore.engine.gradients import StepGradients
from mpcore.engine.optimizer import MixedPrecisionOptimizer
from mpcore.engine.schedulers import step_scheduler
from mpcore.engine.step_result import StepResult

__all__ = [
    "Look",
    "MixedPrecisionOptimizer",
    "StepGradients",
    "StepResult",
    "is_unscaled",
    "step_scheduler",
    "tell_losses",
    "unscale_by",
    "unwrapped",
    "watch_clips",
]
