"""One training of a comparison, as the loop that is compared sees it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mpcore.comparison.contender import BASELINE, Contender
from mpcore.engine import MixedPrecisionOptimizer, StepGradients, StepResult
from mpcore.errors import StageError
from mpcore.monitoring.memory import Resident, SavedForBackward, resident_bytes
from mpcore.monitoring.monitor import Monitor
from mpcore.monitoring.records import Record
from mpcore.monitoring.run_log import RunLog
from mpcore.precision import Policy

Model = TypeVar("Model", bound=nn.Module)


class _RunMonitor(Monitor):
    """A monitor that also keeps the first loss, and what its graph had saved by then."""

    saved: SavedForBackward | None = None
    activations: int | None = None
    first_loss: Tensor | None = None
    memory: Resident | None = None

    def see_loss(self, outputs: Any, name: str = "") -> None:
        """Hears what is going to be scaled."""
        saved, self.saved = self.saved, None
        if saved is not None:
            self.activations = saved.stop()
            if isinstance(outputs, Tensor) and outputs.numel() == 1:
                self.first_loss = outputs.detach().clone()
        super().see_loss(outputs, name)

    def end_step(self, gradients: StepGradients, result: StepResult, *, own_scale: bool) -> None:
        """Hears how a step ended."""
        super().end_step(gradients, result, own_scale=own_scale)
        self.give_up()  # the loop goes around `backward`: what was saved must not pile up
        if self.reading is not None:
            self.memory = self.reading.memory
        else:  # short runs have no reading; the first steps may have been skipped
            self.memory = resident_bytes(self._optimizer)

    def give_up(self) -> None:
        """Ends what no loss has ended."""
        saved, self.saved = self.saved, None
        if saved is not None:
            saved.stop()


class TrainingRun:
    """What `compare` hands to a training loop: which policy, which seed, and what to train with.

    Attributes:
        policy: Of this run.
        seed: Of this run. Python's, NumPy's and torch's generators have been seeded with it.
        label: What tables call the policy and its loss scale.

    Example:
        >>> import mpcore
        >>> def train(run):
        ...     model = nn.Linear(2, 1)
        ...     sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     model, optimizer = run.prepare(model, sgd)
        ...     optimizer.backward(model(torch.ones(1, 2)).sum())
        ...     optimizer.step()
        ...     print(run.label, run.seed, model.weight.dtype)
        ...     return 1.0
        >>> result = mpcore.compare(train, ["float16"], seeds=1)
        float32 0 torch.float32
        float16 0 torch.float16
    """

    def __init__(
        self, contender: Contender, seed: int, every: int, *, counts_activations: bool = True
    ) -> None:
        self.label = contender.label
        self.policy: Policy = contender.policy
        self.seed = seed
        self._contender = contender
        self._every = every
        self._counts_activations = counts_activations
        self._records: list[Record] = []
        self._monitor: _RunMonitor | None = None
        self._optimizer: MixedPrecisionOptimizer | None = None

    def prepare(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        *,
        overrides: Mapping[str, str] | None = None,
    ) -> tuple[Model, MixedPrecisionOptimizer]:
        """Puts a model under the policy of this run and wraps its optimizer; may sync.

        FP32 runs take the optimizer's own step. Call it once, before training.

        Args:
            model: With FP32 parameters.
            optimizer: Over its parameters.
            overrides: As for `Policy.apply`: modules that stay in FP32.

        Returns:
            The model, and the optimizer to call `backward`, `step` and `zero_grad` of.

        Raises:
            StageError: Called twice.
        """
        if self._optimizer is not None:
            raise StageError(
                "prepare(): expected one call in each run, got a second one. Use what the first "
                "returned; several models train as param groups of one optimizer."
            )
        path: Literal["general", "auto"] = "general" if self._contender == BASELINE else "auto"
        wrapped = MixedPrecisionOptimizer(optimizer, self._contender.loss_scale, path=path)
        model = self.policy.apply(model, wrapped, overrides=overrides)
        monitor = _RunMonitor(wrapped, model, every=self._every, sinks=[self._records.append])
        if self._counts_activations:
            monitor.saved = SavedForBackward(model.parameters())
            monitor.saved.start()
        self._monitor, self._optimizer = monitor, wrapped
        return model, wrapped

    def close(self) -> None:
        """Ends the run; `compare` calls it."""
        if self._monitor is not None:
            self._monitor.give_up()
            self._monitor.close()

    @cached_property
    def log(self) -> RunLog:
        """What a monitor told of it; to be asked once it is closed."""
        return RunLog.of(self.label, self._records)

    @property
    def activations(self) -> int | None:
        """Bytes that the first forward pass saved for its backward pass."""
        return None if self._monitor is None else self._monitor.activations

    @property
    def memory(self) -> Resident | None:
        """Bytes that stay, as of the last reading."""
        return None if self._monitor is None else self._monitor.memory

    @property
    def first_loss(self) -> float | None:
        """The loss of the first backward pass, if it went through the optimizer; syncs."""
        first = None if self._monitor is None else self._monitor.first_loss
        return None if first is None else float(first)
