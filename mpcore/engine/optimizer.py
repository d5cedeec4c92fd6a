"""`MixedPrecisionOptimizer`: put it around a `torch.optim` optimizer and train in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from mpcore.base import outside_graphs, outside_graphs_step
from mpcore.engine.backward_passes import BackwardPasses
from mpcore.engine.external import External
from mpcore.engine.gradients import StepGradients
from mpcore.engine.idle_watch import IdleWatch
from mpcore.engine.inner_methods import InnerMethods
from mpcore.engine.joins import Joins
from mpcore.engine.paths import GroupPath, Paths, check_path
from mpcore.engine.readings import Readings
from mpcore.engine.saving import Saving, add_section, take_over_edits
from mpcore.engine.stage import Stage
from mpcore.engine.step_ranks import StepRanks
from mpcore.engine.step_result import StepResult
from mpcore.engine.unscaling import Unscaling
from mpcore.engine.wrapper import OptimizerWrapper
from mpcore.engine.zero_step import zero_gradients
from mpcore.errors import ArgumentError
from mpcore.loss_scale import (
    DynamicLossScale,
    Losses,
    LossScale,
    LossScaleTensors,
    check_loss_scale,
    initial_state,
)
from mpcore.masters import WeightEdits, Writes, check_inner, check_moments
from mpcore.ranks import Ranks, check_ranks


class MixedPrecisionOptimizer(
    BackwardPasses, Unscaling, Readings, Joins, InnerMethods, Saving, OptimizerWrapper
):
    """Wraps an optimizer: FP32 masters for 16-bit parameters, loss scaling, skipped overflows.

    It is a `torch.optim.Optimizer` and shares `param_groups` with the one it wraps, so LR
    schedulers on either drive it. `state[p]["master"]` is the float32 master of a 16-bit `p`,
    `float32_state(p)` a copy of master and moments however they lie in memory.

    Args:
        optimizer: Any `torch.optim.Optimizer` but SparseAdam; best made from
            `model.named_parameters()`, so that reports can name parameters. State that it
            already has is kept. Do not call its `step` yourself any more.
        loss_scale: `DynamicLossScale(...)`, or Headroom-, Static-, `NoLossScale`.
        backend: "auto", or one by name: see `mpcore.backends.resolve`.
        path: "fused" (the backend computes the whole step; AdamW, Adam, SGD, Adagrad and Lion of
            exactly these types), "general" (the optimizer's own step), or "auto": fused if it can.
        on_weight_edit: What `step` does about 16-bit weights that somebody else wrote to. "adopt":
            elements that are no longer their rounded master become masters, all others keep theirs;
            one warning, no host sync. "always" looks at every weight in every step, and so sees
            writes through `.data` and NumPy. "raise": a StageError; a comparison then syncs.
        ranks: `mpcore.Ranks(...)`: the ranks that skip, clip and move the loss scale as one. None:
            those of the meshes of DTensors; without any, this process decides alone.
        masters: How masters lie in memory. "float32": as tensors. "split": the weight is the upper
            half of its master, an int16 `state[p]["remainder"]` the lower one, 2 bytes a parameter
            less; the same bits but for float16 below 2^-16. "none": nothing beside a bfloat16
            weight, which is rounded at random. See docs/memory.md.
        moments: How moments lie in memory. "float32", "bfloat16" (rounded at random), or "int8"
            (8 bits and a scale for each 256 numbers of a row; short rows get bfloat16). What is not
            "float32" needs a fused step, as `masters="none"` does.
        seed: Of what is rounded at random.

    Raises:
        ArgumentTypeError: `optimizer` or `loss_scale` is something else.
        ArgumentError: It is wrapped already, a parameter is complex, integer or there twice,
            an option is unknown, or the step cannot be fused and `path` is "fused".
        BackendError: The backend asked for cannot run here.

    Example:
        >>> import torch, mpcore
        >>> model = torch.nn.Linear(4, 1).half()
        >>> optimizer = mpcore.MixedPrecisionOptimizer(
        ...     torch.optim.AdamW(model.parameters(), lr=1e-3),
        ...     mpcore.DynamicLossScale(init=2.0**10),
        ... )
        >>> optimizer.backward(model(torch.ones(8, 4).half()).float().square().mean())
        >>> norm = optimizer.clip_grad_norm_(1.0)
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> optimizer.last_step.skipped
        False
    """

    _kept = (
        *OptimizerWrapper._kept,
        *("loss_scaling", "_scale", "_losses", "_saturated", "_began", "_path", "on_weight_edit"),
        "ranks",
    )

    #: torch.amp.GradScaler then hands over `grad_scale` and `found_inf` and always calls `step`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss_scale: LossScale = DynamicLossScale(),  # noqa: B008 - a frozen value
        *,
        backend: Literal["auto", "reference", "cpu", "compiled", "triton"] = "auto",
        path: Literal["auto", "fused", "general"] = "auto",
        on_weight_edit: Literal["adopt", "always", "raise"] = "adopt",
        ranks: Ranks | None = None,
        masters: Literal["float32", "split", "none"] = "float32",
        moments: Literal["float32", "bfloat16", "int8"] = "float32",
        seed: int = 0,
    ) -> None:
        check_inner(optimizer, MixedPrecisionOptimizer)
        check_loss_scale(loss_scale)
        check_path(path)
        self.ranks = check_ranks(ranks)
        held = check_moments(moments, seed)
        super().__init__(optimizer, backend, masters, held, on_weight_edit)
        self.loss_scaling = loss_scale
        self._path = path
        home = next((param.device for param in self._params()), torch.device("cpu"))
        self._scale = LossScaleTensors.from_state(initial_state(loss_scale), home)
        self._losses = Losses()
        self._saturated = torch.zeros((), dtype=torch.int64, device=home)
        self._began = False  # whether a step has counted
        self._start()
        self._mark_groups()  # last: what was refused is as it was

    def _start(self) -> None:
        """Makes what does not outlive a step, or follows from the rest."""
        self.register_state_dict_pre_hook(take_over_edits)
        self.register_state_dict_post_hook(add_section)
        self._writes = Writes()
        self._climb = None
        self._idle = IdleWatch()
        self._edits = WeightEdits(
            self.on_weight_edit,
            self._masters,
            self._module,
            self.param_groups,
            self._saturated,
        )
        self._paths = Paths(
            asked=self._path,
            inner=self.inner,
            masters=self._masters,
            backend=(self.backend, self._module),
            saturated=self._saturated,
            writes=self._writes,
            edits=self._edits,
        )
        self._stage = Stage(
            groups=self.param_groups,
            device_of=self._device_of,
            masters=self._masters,
            backend=self._module,
            loss_scaling=self.loss_scaling,
            tensors=self._scale,
            losses=self._losses,
            plan=self._paths.plan,
            writes=self._writes,
            edits=self._edits,
            ranks=StepRanks(
                self.ranks, self.param_groups, self._masters, self.loss_scaling, self._scale
            ),
        )

    @property
    def path(self) -> tuple[GroupPath, ...]:
        """The path of each param group, and why: "fused" or "general"."""
        return self._paths.current()

    @outside_graphs_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates, or skips if a gradient is not finite; then moves the loss scale.

        Syncs with the host once, or not at all if the wrapped optimizer takes `found_inf`
        (`fused=True` ones do). With a closure, once per evaluation.

        Args:
            closure: Clears gradients, computes the loss, calls `backward(loss)` of this object,
                returns the loss. An overflow in any evaluation undoes the whole step. One that
                clears no gradients adds to those that wait for a step; if it clears them, a
                warning says so. Without any gradient it is a step without gradients.

        Returns:
            The closure's loss, or None.

        Raises:
            StageError: The gradients were never scaled. (Checkpoint tools step once over all-zero
                gradients before training to create state: that is accepted.) Or a master came
                without its weight: see `sync_masters_from_model`. Or somebody wrote numbers that
                are not finite to a weight; with "always" that may be told after the step.
            ArgumentError: A gradient is sparse, or a parameter changed its device or dtype.
            LossScaleError: The loss scale is one with `at_min="raise"`. The step has ended.

        An exception before the first write leaves the step before; after one in the midst of
        writing `step` and `state_dict` raise until a state is loaded.
        """
        self._check_between_steps("step()")
        self._masters.take_over_edits(self.state, self.param_groups)
        try:
            return self._step_with_closure(closure) if closure is not None else self._step()
        except BaseException:
            External.leave(self)
            self._stage.note_failed()
            raise

    def _step(self) -> None:
        zeros = None
        if not (self._began or External.of(self) or self._stage.ranks.joins()):
            if self._stage.is_untouched:
                zeros = zero_gradients(self._stage.parameters, self._masters, self._module)
            if not self._stage.ranks.all(zeros is not None):
                zeros = None
        if zeros is not None:
            self._paths.initialise_state(zeros)
            return
        collected = self._stage.collect("step()", External.of(self))
        self._edits.adopt(began=self._began, later=self._paths.in_update(collected))
        if collected.params:
            move = self._stage.moves.of_step(External.of(self))
            self._finish(collected, self._paths.step(collected, move))
        elif collected.has_ranks:
            collected.agree()
            self._paths.step_without_gradients(collected.found_inf())
            self._finish(collected, moved=False)
        else:
            self._idle.see(any_gradient=False, parameters=len(self._params()))
            self._paths.step_without_gradients()
            self._stage.throw_away(last_step=True)

    def _step_with_closure(self, closure: Callable[[], Any]) -> Any:
        self._stage.check_whole("step(closure)")
        self._stage.ranks.check_not_joined("step(closure)")
        self._edits.check("step(closure)")
        self._edits.adopt(began=self._began, later=self._paths.in_update())
        self._stage.begin_closure()
        external = External.of(self)
        any_gradient = False

        def collect() -> StepGradients:
            nonlocal any_gradient
            gradients = self._stage.collect_pass("step(closure)", external)
            self._edits.adopt(began=self._began, later=self._paths.in_update(gradients))
            any_gradient = any_gradient or bool(gradients.params)
            return gradients

        try:
            first = None
            if self._paths.uses_waiting() and self._stage.waiting.take(whole=self._makes_two):
                first = self._stage.collect_pass("step(closure)", external)
            result, gradients, moved = self._paths.step_with_closure(
                closure, collect, self._stage.moves.of_step(external), first
            )
        except BaseException:
            self._stage.forget()
            raise
        finally:
            self._stage.drop_gradients()
            self._stage.passes = self._stage.passes.stepped()
        if any_gradient or first is not None or gradients.has_ranks:
            self._finish(gradients, moved)
        else:
            self._idle.see(any_gradient=False, parameters=len(self._params()))
            self._stage.throw_away(last_step=True)
        return result

    def _finish(self, gradients: StepGradients, moved: bool) -> None:
        self._began = True
        self._idle.see(any_gradient=True, parameters=len(gradients.params))
        self._stage.finish(gradients, External.of(self), moved=moved)
        self._edits.hear()  # last: it may raise

    @property
    def last_step(self) -> StepResult | None:
        """What the last step did, None before the first; reading it syncs only where it says so."""
        return self._stage.result

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears every gradient and forgets an `unscale_` or clip that no step used; no host sync.

        If that had found an overflow, the step counts as a skipped one and the loss scale falls: a
        loop may step only if the norm is finite.

        Args:
            set_to_none: Set gradients to None instead of filling them with zeros.

        Raises:
            LossScaleError: As from `step`; gradients are cleared then.
        """
        try:
            self._stage.throw_away()  # first: the model's own gradients are to be cleared
        finally:
            super().zero_grad(set_to_none)
            self._stage.note_cleared(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        self._check_between_steps("copying it")
        return {**super().__getstate__(), "_accumulated": self._stage.accumulated}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        accumulated = state.pop("_accumulated", None)
        super().__setstate__(state)
        for _, master in self._masters.items():
            master.grad = None  # of the step that the original was in
        self._start()
        self._stage.start_anew(int(self._scale.count("overflows_at_min")))
        self._stage.resume(accumulated)

    def __repr__(self) -> str:
        try:
            paths = ", ".join(f"{i}: {path}" for i, path in enumerate(self.path))
        except ArgumentError as error:  # options that a step is going to refuse
            paths = f"none, {error}"
        head = (
            f"MixedPrecisionOptimizer({type(self.inner).__name__}, {self.loss_scaling}, "
            f"backend={self.backend!r}, path of each group: {paths})"
        )
        return f"{head}\n{super().__repr__()}"
