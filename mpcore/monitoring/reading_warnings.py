"""What a reading warns of, once of each kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpcore.monitoring.facts import Past
from mpcore.monitoring.idle_training import IdleTraining
from mpcore.monitoring.model_state import not_finite
from mpcore.monitoring.reading import Reading
from mpcore.monitoring.standing_averages import StandingAverages
from mpcore.monitoring.update_sample import Moves
from mpcore.monitoring.verdicts import first_few


class ReadingWarnings:
    """Warns of training that goes nowhere, averages that stand still, weights that are not finite.

    Args:
        optimizer: Whose learning rates.
        model: Whose averages; None has none.
        weights: Returns them by name; asked when one is not finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None,
        weights: Callable[[], Sequence[tuple[str, Tensor]]],
    ) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._told: set[str] = set()
        self._averages = StandingAverages(model)
        self._idle = IdleTraining()

    def restart(self) -> None:
        """Forgets readings before: a checkpoint was loaded."""
        self._idle.restart()

    def look(
        self,
        reading: Reading,
        past: Sequence[Past],
        moves: Moves,
        *,
        own_scale: bool,
    ) -> None:
        """Looks at a reading that everybody has, since a warning may be an error.

        Syncs where there is an average, and where a weight is not finite.

        Args:
            reading: Of the last step.
            past: The last steps, that one included.
            moves: What the step did to masters.
            own_scale: Whether the optimizer's own loss scale was used.
        """
        groups = self._optimizer.param_groups
        found = self._idle.look(reading, past, groups, moved=moves.usual, own_scale=own_scale)
        if "average" not in self._told:
            found["average"] = self._averages.look()
        if not (moves.finite or reading.skipped or "weights" in self._told):
            found["weights"] = _hidden(not_finite(self._weights()), reading.step)
        for kind, text in found.items():  # those behind one that is an error: at the next reading
            if text is not None and kind not in self._told:
                self._told.add(kind)
                warnings.warn(f"{text} This is said once.", stacklevel=3)


def _hidden(names: Sequence[str], step: int) -> str:
    return (
        f"Weights are not finite after step {step}: {first_few(names)}. No gradient shows it, "
        "since what follows makes the outputs finite again, as tanh and sigmoid do; so no step is "
        "skipped. Go back to a checkpoint, and look at what wrote to them."
    )
