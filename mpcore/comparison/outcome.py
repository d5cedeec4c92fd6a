"""What one run of a comparison did."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from mpcore.comparison.training_run import TrainingRun
from mpcore.monitoring.memory import Resident
from mpcore.monitoring.run_log import RunLog


@dataclass(frozen=True)
class Outcome:
    """What one run did.

    Attributes:
        label: Of the policy and its loss scale.
        seed: Of the run.
        metric: What the loop returned; NaN if it failed.
        log: Losses, scales, skipped steps, readings.
        seconds: Median of a step, from the end of one to the end of the next; None of one step.
        memory: Bytes that stay.
        activations: Bytes that the first forward pass saved for its backward pass.
        first_loss: Of the first backward pass; None if the optimizer did not see it.
        failure: Why it failed; None if it did not.
    """

    label: str
    seed: int
    metric: float
    log: RunLog
    seconds: float | None
    memory: Resident | None
    activations: int | None
    first_loss: float | None
    failure: str | None = None

    @staticmethod
    def of(run: TrainingRun, metric: float, failure: str | None) -> Outcome:
        """Returns what became of a run that has ended."""
        log = run.log
        seconds = statistics.median(log.seconds) if log.seconds else None
        return Outcome(
            label=run.label,
            seed=run.seed,
            metric=metric,
            log=log,
            seconds=seconds,
            memory=run.memory,
            activations=run.activations,
            first_loss=run.first_loss,
            failure=failure,
        )
