"""`Monitor`: statistics of gradients every n steps, and a report on each step that was skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcore.base import check_count
from mpcore.engine import MixedPrecisionOptimizer, StepGradients, StepResult, unwrapped
from mpcore.monitoring.activation_watch import watch_of
from mpcore.monitoring.facts import Facts, NanStreak, Past
from mpcore.monitoring.findings import Finding
from mpcore.monitoring.history import Course, History
from mpcore.monitoring.idle_training import SKIPS
from mpcore.monitoring.memory import bytes_of_sums, resident_bytes
from mpcore.monitoring.model_state import BufferWatch, large_weights, not_finite
from mpcore.monitoring.names import Names
from mpcore.monitoring.pass_counts import PassCounts
from mpcore.monitoring.pass_losses import PassLosses
from mpcore.monitoring.pending import LIMIT, Pending, Step, steps_taken
from mpcore.monitoring.rank_readings import check_agrees, of_all_ranks
from mpcore.monitoring.reading import Reading, summed_up
from mpcore.monitoring.reading_warnings import ReadingWarnings
from mpcore.monitoring.records import Record
from mpcore.monitoring.report import OverflowReport, own_rank
from mpcore.monitoring.step_findings import findings_of, norm_of
from mpcore.monitoring.update_sample import UpdateSample
from mpcore.monitoring.used_share import used_share
from mpcore.monitoring.verdict_log import VerdictLog
from mpcore.monitoring.verdicts import verdict_on

_LONGEST = 2**14  # steps that a course holds, however rare readings are


class Monitor:
    """Watches the steps of an optimizer; syncs with the host on reported steps alone.

    Every `every` steps it counts the values of each gradient by exponent and makes a `Reading`:
    Triton kernels count in the pass that looks for overflow, other backends in another pass. On a
    skipped step it makes an `OverflowReport`: at once on a CPU, where looking costs nothing; on a
    CUDA device when the host has heard that the step was skipped, some steps later, and in the
    next reading, `report()` or `close()` at the latest; on others in readings and `report()` alone.
    A late report says how all was after its own step, but for weights and buffers: those are looked
    at when it is made. A host that is 32 steps ahead of the device waits for the first of these.

    Steps have the optimizer's numbers: after a resume they go on from the checkpoint's.

    Both go to the sinks, and with each reading a `Course`: what became of each step since the one
    before, of the last 16,384 at most. Verdicts go to the logger "mpcore.monitor" too, one line
    each and each kind once in `every` steps: INFO where nothing is wrong, else WARNING.

    Copies and pickles of the optimizer are not watched. Averages of the model's weights that are
    kept in 16 bits and stand still are warned of once, in a reading.

    Args:
        optimizer: What to watch; one monitor at a time. Trainers may have wrapped it.
        model: For names of parameters, and to look at its buffers when a step was skipped.
        every: Steps from one reading to the next; the first comes after as many.
        window: Steps that verdicts look back on, and that `course()` returns.
        sinks: Each is called with every record; see `mpcore.monitoring.sinks`; or any function.
        activations: Whether readings also have what each module of `model` returned. In the steps
            that are read, and only there, modules have a forward hook that counts.
        over_ranks: Whether readings are of all ranks that the optimizer agrees with, on each. They
            exchange counts then, so that every rank needs a monitor with the same `every`.

    Raises:
        ArgumentTypeError: There is no `MixedPrecisionOptimizer`, or a count is no integer.
        ArgumentError: A count is below 1, or there are no ranks to agree with.

    Example:
        >>> import torch, mpcore
        >>> model = torch.nn.Linear(2, 1).half()
        >>> optimizer = mpcore.MixedPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> monitor = mpcore.Monitor(optimizer, model, every=1)
        >>> optimizer.backward((model.weight.float() * 8).sum())  # 8 times 2^16 is too much
        >>> optimizer.step()
        >>> monitor.report().verdict.name, [f.name for f in monitor.report().overflowed]
        ('search', ['weight'])
    """

    def __init__(
        self,
        optimizer: MixedPrecisionOptimizer | torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        every: int = 100,
        window: int = 256,
        sinks: Iterable[Callable[[Record], object]] = (),
        activations: bool = False,
        over_ranks: bool = False,
    ) -> None:
        optimizer = unwrapped(optimizer)
        if over_ranks:
            check_agrees(optimizer)
        self._over_ranks = over_ranks
        self._every = check_count("every", every)
        self._optimizer = optimizer
        self._model = model
        self._buffers = BufferWatch(model)
        self._nans = NanStreak()
        self._warnings = ReadingWarnings(optimizer, model, self._parameters)
        self._names = Names(optimizer, model)
        self._sinks = list(sinks)
        self._device = optimizer._scale.scale.device
        self._window = check_count("window", window)
        self._pending = Pending.on(self._device)
        self._history = History(max(window, SKIPS, min(every, _LONGEST)), self._device, LIMIT)
        self._told = steps_taken(optimizer)  # of which sinks have heard
        self._history.restart(self._told)
        self._losses = PassLosses(self._device)  # of this step, like the next
        self._counts = PassCounts()
        self._sample: UpdateSample | None = None
        self._used: Tensor | None = None  # by the last clean step that was looked at
        self._last: Step | None = None
        self._report: OverflowReport | None = None
        self._log = VerdictLog(self._every)
        #: The last reading, None before the first.
        self.reading: Reading | None = None
        self._activations = watch_of(activations, model, optimizer)
        optimizer._stage.watcher = optimizer._stage._sums.watcher = self
        self._activations.arm(self._reads_now())

    def close(self) -> None:
        """Stops watching, and tells the sinks of the steps since the last reading; syncs."""
        if self._optimizer._stage.watcher is self:
            self._optimizer._stage.watcher = self._optimizer._stage._sums.watcher = None
        self._activations.end()
        self._deliver(wait=True)
        self._emit_course()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def course(self) -> Course:
        """Returns what became of the last steps, at most `window`; syncs with the host."""
        return self._history.course(self._window)

    def report(self) -> OverflowReport | None:
        """Returns why the last step was skipped, None if it was not; syncs with the host.

        Sinks and the log hear first of skipped steps that they have not heard of, this one as well.
        """
        self._deliver(wait=True)
        if self._last is None or not self._last.result.skipped:
            return None
        if self._report is None:
            self._report = self._made_report(self._last)
        return self._report

    def see_loss(self, outputs: Any, name: str = "") -> None:
        """Hears a loss before it is scaled; no host sync.

        The optimizer calls it in `scale` and `backward`, and `mpcore.GradScaler` has it called.
        Call it yourself, before the backward pass, where torch's own scaler scales.

        Args:
            outputs: The loss; what is no tensor of one element counts as not known.
            name: That of `add_loss`.
        """
        if self._losses.see(outputs, name):
            self._counts = PassCounts()

    @property
    def has_losses(self) -> bool:
        """Whether it has heard of a loss since the last step; no host sync."""
        return self._losses.are_any

    def see_pass(self, params: Sequence[Tensor], scale: Tensor, name: str) -> None:
        """Hears whose gradients are going to be added up; the optimizer calls it."""
        if self._reads_now():
            self._counts.see(self._optimizer, params, scale, name)

    def _reads_now(self) -> bool:
        return (self._history.steps + 1) % self._every == 0

    def begin_step(self, params: Sequence[Tensor]) -> bool:
        """Hears whose gradients are collected; the optimizer calls it."""
        self._losses.note_collected()  # closures are evaluated several times in a step
        if (looks := self._reads_now()) and self._sample is None:
            self._sample = UpdateSample(params, self._optimizer._masters)
        return looks

    def forget(self, *, last_step: bool) -> None:
        """Hears that passes were thrown away; the optimizer calls it."""
        self._losses.clear()  # a sample stays: closures clear gradients, and no master has moved
        self._counts = PassCounts()
        if last_step:
            self._last = self._report = self._sample = None

    def note_loaded(self) -> None:
        """Hears that a checkpoint was loaded, tells of the steps before; syncs."""
        self._deliver(wait=True)
        self._emit_course()
        self._told = steps_taken(self._optimizer)
        self._history.restart(self._told)
        self._warnings.restart()
        self._activations.end()
        self._activations.arm(self._reads_now())

    @torch.no_grad()
    def end_step(self, gradients: StepGradients, result: StepResult, *, own_scale: bool) -> None:
        """Hears how a step ended; the optimizer calls it."""
        sample, counts = self._sample, self._counts
        self._sample = self._report = None
        self._counts = PassCounts()
        number, looks = self._history.steps, gradients.findings.looks()
        found_inf = gradients.found_inf()
        late = self._pending if sample is None else None
        sent = None if late is None else late.send(self._optimizer, found_inf)
        self._last = step = Step(number, gradients, result, self._used, own_scale, sent)
        norm, scale = norm_of(looks, self._device), gradients.unscaled_by.double().reciprocal()
        self._history.add(scale, found_inf, norm, self._losses.taken(gradients.accumulated))
        if sample is None:
            self._activations.arm(self._reads_now())
        self._note_used(gradients, found_inf)
        self._deliver(wait=sample is not None)  # steps before come first
        if late is not None:
            late.add(step)
        if sample is not None:
            optimizer = self._optimizer
            moves = sample.moves(optimizer._masters, optimizer._stage._backend)
            past = self._history.read(SKIPS)
            self.reading = self._made_reading(step, past[-1], counts, moves.lost)
            self._emit(self.reading)  # first: a warning may be an error
            if self.reading.skipped:
                self._tell(step)
            self._emit_course()
            self._warnings.look(self.reading, past, moves, own_scale=own_scale)
        elif self._pending is None and self._device.type == "cpu" and result.skipped:
            self._tell(step)

    def _deliver(self, *, wait: bool) -> None:
        """Tells of steps before that were skipped, if the host has heard so or shall wait."""
        if self._pending is not None:
            for step in self._pending.skipped(wait=wait):
                if self._history.holds(step.number):  # not after a capture of very many steps
                    self._tell(step)

    def _note_used(self, gradients: StepGradients, found_inf: Tensor) -> None:
        """Notes which share of its format the largest unscaled gradient takes; no host sync."""
        now = used_share(gradients, self._device)
        if now is not None:
            before = torch.zeros_like(now) if self._used is None else self._used
            self._used = torch.where(found_inf != 0, before, now)

    def _findings(
        self, gradients: StepGradients, scale: float, counts: PassCounts | None = None
    ) -> Sequence[Finding]:
        named = self._names.current()
        return findings_of(gradients, scale, self._optimizer, self._model, named, counts)

    def _made_reading(
        self, step: Step, past: Past, counts: PassCounts, lost: float | None
    ) -> Reading:
        gradients = step.gradients
        added = gradients.params if gradients.accumulated is not None else []
        optimizer = self._optimizer
        memory = resident_bytes(optimizer)
        findings = self._findings(gradients, past.scale, counts)
        reading = Reading(
            step=step.number,
            loss_scale=past.scale,
            skipped=past.skipped,
            loss=past.loss,
            grad_norm=past.norm,
            lost_updates=None if past.skipped else lost,
            saturated=optimizer.saturated,
            findings=findings,
            memory=replace(memory, sums=bytes_of_sums(added)),
            largest_loss=past.largest_loss,
            passes=max(len(past.losses), 1),
            rank=own_rank(),
            activations=self._activations.taken(),
            **summed_up(findings),
        )
        self._activations.arm(self._reads_now())  # the next one
        if not self._over_ranks:
            return reading
        return of_all_ranks(reading, optimizer, self._parameters())

    def _made_report(self, step: Step) -> OverflowReport:
        *earlier, now = self._history.read(self._window, step.number)
        passes = tuple(step.result.overflowed_in())
        optimizer, added = self._optimizer, step.gradients.accumulated
        state = step.standing(optimizer)
        own = step.own_scale and not any(one.loss for one in passes)
        findings = self._findings(step.gradients, now.scale)
        weights = self._parameters()
        facts = Facts(
            findings=findings,
            scaling=optimizer.loss_scaling if own else None,
            scale=now.scale,
            next_scale=state.scale if own else None,
            losses=now.losses,
            past=earlier,
            clean_before=state.steps - state.skipped_steps,
            bad_weights=not_finite(weights),
            large_weights=large_weights(weights),
            bad_buffers=self._buffers.damaged(),
            overflowed=[one.micro_batch for one in passes],
            micro_batches=0 if added is None else len(added.micro_batches),
            nan_since=self._nans.since(step.number, now.scale, findings),
        )
        used = 0.0 if step.used_before is None else float(step.used_before)
        return OverflowReport(
            step=step.number,
            verdict=verdict_on(facts),
            loss_scale=now.scale,
            next_scale=facts.next_scale,
            loss=now.loss,
            losses=tuple(one.value for one in now.losses) if len(now.losses) > 1 else (),
            skips_in_a_row=state.skips_in_a_row,
            skipped_steps=state.skipped_steps,
            headroom_before=-math.log2(used * now.scale) if used else None,
            findings=findings,
            passes=passes,
            rank=own_rank(),
        )

    def _parameters(self) -> list[tuple[str, Tensor]]:
        name_of = self._names.current()
        return [(name_of(param), param) for param in self._optimizer._params()]

    def _emit_course(self) -> None:
        untold = self._history.steps - self._told
        self._told += untold
        if untold:
            self._emit(self._history.course(untold))

    def _emit(self, record: Record) -> None:
        for sink in self._sinks:
            sink(record)

    def _tell(self, step: Step) -> None:
        """Makes the report of a skipped step, for sinks and the log."""
        report = self._made_report(step)
        if step is self._last:
            self._report = report
        self._emit(report)
        self._log.note(report)
