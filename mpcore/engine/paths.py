"""Which path a step takes: fused where an optimizer and its options are known, else general."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcore.backends import Backend, ScaleMove
from mpcore.base import held_here, why_no_memory
from mpcore.engine.fused_path import FusedPath
from mpcore.engine.general_path import GeneralPath, is_torchs
from mpcore.engine.gradients import StepGradients
from mpcore.errors import ArgumentError
from mpcore.masters import DirectStepGuard, Groups, Masters, StepPlan, WeightEdits, Writes
from mpcore.updates import rule_of

PATHS = ("auto", "fused", "general")


def check_path(path: str) -> None:
    """Raises unless `path` is one of `PATHS`."""
    if path not in PATHS:
        raise ArgumentError(f"path: expected one of {', '.join(PATHS)}, got {path!r}.")


class GroupPath(NamedTuple):
    """The path of one param group.

    Attributes:
        path: "fused" or "general".
        reason: Why it is not the fused one, or which update it is.

    Example:
        >>> str(GroupPath("general", "foreach=True asks for torch's own implementation"))
        "general: foreach=True asks for torch's own implementation"
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def choose_paths(asked: str, inner: torch.optim.Optimizer, backend: str) -> tuple[GroupPath, ...]:
    """Returns the path of each param group; all take the same one. No host sync.

    Args:
        asked: "auto", "fused" or "general".
        inner: The wrapped optimizer.
        backend: Its name. The reference backend is an oracle and fuses only when asked to.

    Raises:
        ArgumentError: "fused" was asked for and cannot be taken.
    """
    groups = inner.param_groups
    if asked == "general":
        return tuple(GroupPath("general", "it was asked for") for _ in groups)
    if asked == "auto" and backend == "reference":
        reason = 'the reference backend fuses only if path is "fused"'
        return tuple(GroupPath("general", reason) for _ in groups)
    reasons = _reasons(inner, groups, backend)
    stopped = next((i for i, reason in enumerate(reasons) if reason is not None), None)
    if stopped is None:
        rule = rule_of(inner)
        return tuple(GroupPath("fused", "" if rule is None else rule.name) for _ in groups)
    if asked == "fused":
        raise ArgumentError(
            f"path: expected a step that can be fused, got param group {stopped}: "
            f'{reasons[stopped]}. Pass path="auto" or path="general".'
        )
    because = f"group {stopped} needs it"
    return tuple(GroupPath("general", reason or because) for reason in reasons)


def _signature(inner: torch.optim.Optimizer, version: int) -> list[Any]:
    """Returns what the choice depends on; cheap, for each step.

    Args:
        inner: The wrapped optimizer.
        version: That of the masters, which counts when parameters got other memory.
    """
    rule = rule_of(inner)
    groups = inner.param_groups
    sizes = [len(group["params"]) for group in groups]
    if rule is None:
        return [sizes, version]
    reasons = [rule.why_not(_options(inner, group)) for group in groups]
    return [sizes, version, _why_step_must_run(inner), *reasons]


def _reasons(inner: torch.optim.Optimizer, groups: Groups, backend: str) -> list[str | None]:
    """Returns per group why its step cannot be fused, or None."""
    rule = rule_of(inner)
    if rule is None:
        return [f"no fused update for {type(inner).__name__}"] * len(groups)
    hooked = _why_step_must_run(inner)
    if hooked is not None:
        return [hooked] * len(groups)
    return [
        rule.why_not(_options(inner, group)) or _why_not_params(group["params"], backend)
        for group in groups
    ]


def _options(inner: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Returns what the optimizer reads of a group; LR schedulers keep their own numbers there."""
    return {name: group[name] for name in inner.defaults if name in group}


def _why_step_must_run(inner: torch.optim.Optimizer) -> str | None:
    """Returns what would be lost if the wrapped optimizer's own `step` were not called."""
    hooks = [*inner._optimizer_step_pre_hooks.values(), *inner._optimizer_step_post_hooks.values()]
    if not all(isinstance(hook, DirectStepGuard) for hook in hooks):
        return "the wrapped optimizer has step hooks"
    step: Any = inner.__dict__.get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return "the wrapped optimizer's step was replaced"
    return None


def _why_not_params(params: list[Tensor], backend: str) -> str | None:
    for param in params:
        here = held_here(param.detach())
        # the reference backend computes with torch's operations, which wrappers know
        if (reason := why_no_memory(here)) and backend != "reference":
            return f"a parameter cannot be reached by address: {reason}"
        if param.dtype == torch.float64:
            return "a parameter is float64"
        if not here.is_contiguous() and not _is_dense(here):
            return "a parameter has gaps in memory or overlaps itself"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie in memory side by side, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class Paths:
    """Both paths over one optimizer, and which of them the next step takes.

    Args:
        asked: "auto", "fused" or "general".
        inner: The wrapped optimizer.
        masters: Masters and state.
        backend: Its name and what does the passes.
        saturated: 0-d int64, counts weights clamped to the finite maximum.
        writes: Told before the first write of a step; whoever finishes the step ends it.
        edits: Knows whether an update has to adopt weights that others wrote to.

    Raises:
        ArgumentError: "fused" was asked for and cannot be taken.
    """

    def __init__(
        self,
        asked: str,
        inner: torch.optim.Optimizer,
        masters: Masters,
        backend: tuple[str, Backend],
        saturated: Tensor,
        writes: Writes,
        edits: WeightEdits,
    ) -> None:
        self._asked = asked
        self._backend, module = backend
        self._inner = inner
        self._masters = masters
        rule = rule_of(inner)
        self.general = GeneralPath(inner, masters, module, saturated, writes)
        self._fused: FusedPath | None = None
        if rule is not None:
            self._fused = FusedPath(
                inner, rule, masters, module, saturated, writes=writes, edits=edits
            )
        self._signature: list[Any] = []
        self._chosen: tuple[GroupPath, ...] = ()
        self.current()

    def current(self) -> tuple[GroupPath, ...]:
        """Returns the path of each param group, as options and hooks are now."""
        signature = _signature(self._inner, self._masters.version)
        if signature != self._signature:
            self._chosen = choose_paths(self._asked, self._inner, self._backend)
            self._signature = signature
        return self._chosen

    def _is_fused(self) -> bool:
        return bool(self._chosen) and self._chosen[0].path == "fused"

    def _now(self) -> FusedPath | None:
        """Returns the fused path if the next step takes it."""
        self.current()
        return self._fused if self._is_fused() else None

    def plan(self, params: Sequence[Tensor]) -> StepPlan | None:
        """Returns how the fused path is likely to update `params`; None: the general path steps."""
        fused = self._now()
        return None if fused is None else fused.likely_plan(params)

    def in_update(self, gradients: StepGradients | None = None) -> Sequence[Tensor]:
        """Returns the parameters whose weights the backend's update is going to read.

        Args:
            gradients: What the step takes; None: a closure will tell.
        """
        if gradients is not None:
            return [] if gradients.plan is None else gradients.params
        if self._now() is None:
            return []
        return [param for group in self._inner.param_groups for param in group["params"]]

    def step(self, gradients: StepGradients, move: ScaleMove | None) -> bool:
        """Steps or skips; returns whether the loss scale has moved with it."""
        if gradients.plan is not None and self._fused is not None:
            return self._fused.step(gradients, move)
        self._hand_over()
        self.general.step(gradients)
        return False

    def uses_waiting(self) -> bool:
        """Whether the step may begin with gradients from before its closure.

        All optimizers of torch evaluate it first.
        """
        return self._now() is None and not is_torchs(self._inner)

    def _hand_over(self) -> None:
        if self._fused is not None:
            self._fused.hand_over()

    def step_without_gradients(self, found_inf: Tensor | None = None) -> None:
        """Lets the wrapped optimizer do what it does without gradients: usually nothing.

        Args:
            found_inf: 0-d, what other ranks have found, which the general path waits for: not 0
                means that nobody steps. None: there are no others.
        """
        if self._now() is None and (found_inf is None or not bool(found_inf)):
            self.general.step_without_gradients()

    def call_inner(self, adopt: Callable[[], None], method: Callable[[], Any]) -> Any:
        """Calls a method of the wrapped optimizer over masters, and rounds these into weights.

        Args:
            adopt: Makes weights that others wrote to the masters, which are there by then.
            method: A method of the wrapped optimizer.
        """
        self._hand_over()
        return self.general.call_inner(adopt, method)

    def initialise_state(self, gradients: StepGradients) -> None:
        """Makes the optimizer's state and changes no weight."""
        self.general.initialise_state(gradients)
        if (fused := self._now()) is not None:
            fused.plan(gradients.params)  # makes what only its steps need

    def step_with_closure(
        self,
        closure: Callable[[], Any],
        collect: Callable[[], StepGradients],
        move: ScaleMove | None,
        first: StepGradients | None,
    ) -> tuple[Any, StepGradients, bool]:
        """Returns the closure's loss, the last gradients, and whether the loss scale has moved.

        Args:
            closure: A user's.
            collect: Returns the gradients that it left.
            move: How the loss scale moves, on the fused path.
            first: Gradients that `uses_waiting` asked for, if some waited.
        """
        fused = self._now()
        if fused is not None:
            return fused.step_with_closure(closure, collect, move)
        self._hand_over()
        return *self.general.step_with_closure(closure, collect, first), False
