"""Which path a step takes: fused where an optimizer and its options are known, else general."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcore.backends import Backend, ScaleMove
from mpcore.base import held_here, why_no_memory
from mpcore.engine.device_skips import is_torchs
from mpcore.engine.fused_only import PACKING, check_fused, check_no_call
from mpcore.engine.fused_path import FusedPath
from mpcore.engine.general_path import GeneralPath
from mpcore.engine.gradients import StepGradients
from mpcore.engine.mixed_path import MixedPath, Split, split
from mpcore.errors import ArgumentError
from mpcore.masters import DirectStepGuard, Masters, StepPlan, WeightEdits, Writes
from mpcore.updates import parts_of, rule_of

PATHS = ("auto", "fused", "general")


def check_path(path: str) -> None:
    """Raises unless `path` is one of `PATHS`."""
    if path not in PATHS:
        raise ArgumentError(f"path: expected one of {', '.join(PATHS)}, got {path!r}.")


class GroupPath(NamedTuple):
    """The path of one param group.

    Attributes:
        path: "fused" or "general".
        reason: Why it is not the fused one, or whose update that computes.

    Example:
        >>> str(GroupPath("general", "foreach=True asks for torch's own implementation"))
        "general: foreach=True asks for torch's own implementation"
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def choose_paths(
    asked: str, inner: torch.optim.Optimizer, backend: str, masters: Masters
) -> tuple[GroupPath, ...]:
    """Returns the path of each param group, which does not depend on the others; no host sync.

    Args:
        asked: "auto", "fused" or "general".
        inner: The wrapped optimizer.
        backend: Its name. The reference backend is an oracle and fuses only when asked to.
        masters: Say how masters and moments are kept.

    Raises:
        ArgumentError: "fused" was asked for, or is needed, and cannot be taken.
    """
    groups, store = inner.param_groups, masters.held.store
    if masters.fused_only is not None:
        check_fused(masters.fused_only, asked, backend, _reasons(inner, backend, store))
        asked = "fused"
    if asked == "general":
        return tuple(GroupPath("general", "it was asked for") for _ in groups)
    if asked == "auto" and backend == "reference":
        reason = 'the reference backend fuses only if path is "fused"'
        return tuple(GroupPath("general", reason) for _ in groups)
    reasons = _reasons(inner, backend, store)
    stopped = next((i for i, reason in enumerate(reasons) if reason is not None), None)
    if asked == "fused" and stopped is not None:
        raise ArgumentError(
            f"path: expected a step that can be fused, got param group {stopped}: "
            f'{reasons[stopped]}. Pass path="auto" or path="general".'
        )
    names = [type(part).__name__ for part in parts_of(inner) for _ in part.param_groups]
    return tuple(
        GroupPath("fused", name) if reason is None else GroupPath("general", reason)
        for name, reason in zip(names, reasons, strict=True)
    )


def _signature(inner: torch.optim.Optimizer, version: int) -> list[Any]:
    """Returns what the choice depends on; cheap, for each step.

    Args:
        inner: The wrapped optimizer.
        version: That of the masters, which counts when parameters got other memory.
    """
    found: list[Any] = [version, _why_step_must_run(inner)]
    for part in parts_of(inner):
        rule = rule_of(part)
        if rule is not None and part is not inner:
            found.append(_why_step_must_run(part))
        for group in part.param_groups:
            found += [id(group), len(group["params"])]
            if rule is not None:
                found.append(rule.why_not(_options(part, group)))
    return found


def _reasons(inner: torch.optim.Optimizer, backend: str, store: str) -> list[str | None]:
    """Returns per group why its step cannot be fused, or None."""
    found: list[str | None] = []
    unknown = None
    if store != "float32" and backend not in PACKING:
        unknown = f"the backend {backend!r} has no fused update for masters={store!r}"
    for part in parts_of(inner):
        rule = rule_of(part)
        hooked = unknown or _why_step_must_run(inner) or _why_step_must_run(part)
        for group in part.param_groups:
            if rule is None:
                found.append(f"no fused update for {type(part).__name__}")
            else:
                stopped = hooked or rule.why_not(_options(part, group))
                found.append(stopped or _why_not_params(group["params"], backend))
    return found


def _options(inner: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Returns what the optimizer reads of a group; LR schedulers keep their own numbers there."""
    return {name: group[name] for name in inner.defaults if name in group}


def _why_step_must_run(inner: torch.optim.Optimizer) -> str | None:
    """Returns what would be lost if the wrapped optimizer's own `step` were not called."""
    hooks = [*inner._optimizer_step_pre_hooks.values(), *inner._optimizer_step_post_hooks.values()]
    if not set(map(type, hooks)) <= {DirectStepGuard}:
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
        self.general = GeneralPath(inner, masters, module, saturated, writes)
        self._mixed = MixedPath(self.general, masters, module)
        # by the number of the optimizer in a chain
        self._fused = {
            number: FusedPath(part, rule, masters, module, saturated, writes=writes, edits=edits)
            for number, part in enumerate(parts_of(inner))
            if (rule := rule_of(part)) is not None
        }
        self._signature: list[Any] = []
        self._chosen: tuple[GroupPath, ...] = ()
        self._last: tuple[Sequence[Tensor], Split] | None = None  # of some parameters
        self.current()

    def current(self) -> tuple[GroupPath, ...]:
        """Returns the path of each param group, as options and hooks are now."""
        signature = _signature(self._inner, self._masters.version)
        if signature != self._signature:
            self._chosen = choose_paths(self._asked, self._inner, self._backend, self._masters)
            self._signature, self._last = signature, None
            for path in self._fused.values():
                groups = path.inner.param_groups
                fused = [group for group in groups if self._is_fused(group)]
                path.take(groups if len(fused) == len(groups) else fused)
        return self._chosen

    def _is_fused(self, wanted: dict[str, Any]) -> bool:
        pairs = zip(self._inner.param_groups, self._chosen, strict=True)
        return any(group is wanted and path.path == "fused" for group, path in pairs)

    @property
    def _any_fused(self) -> bool:
        return any(path.path == "fused" for path in self.current())

    def _split(self, params: Sequence[Tensor]) -> Split:
        """Returns which of these parameters take which path in the next step."""
        chosen = self.current()
        if self._last is None or self._last[0] is not params:
            paths = [path.path for path in chosen]
            self._last = params, split(params, self._inner, paths, self._fused)
        return self._last[1]

    def plan(self, params: Sequence[Tensor]) -> StepPlan | None:
        """Returns how a fused path is likely to update some of `params`; None: there is none."""
        last = self._last  # the paths of now are chosen by the step
        split = last[1] if last is not None and last[0] is params else self._split(params)
        for path, some in split.fused:
            if some:
                return path.likely_plan(some)
        return None

    def in_update(self, gradients: StepGradients | None = None) -> Sequence[Tensor]:
        """Returns the parameters whose weights the backend's update is going to read.

        Args:
            gradients: What the step takes; None: a closure will tell.
        """
        params: Sequence[Tensor]
        if gradients is not None:
            params = gradients.params
        else:
            params = [param for group in self._inner.param_groups for param in group["params"]]
        fused = self._split(params).fused
        return fused[0][1] if len(fused) == 1 else [param for _, some in fused for param in some]

    def step(self, gradients: StepGradients, move: ScaleMove | None) -> bool:
        """Steps or skips; returns whether the loss scale has moved with it.

        `in_update` of these gradients has chosen the paths.
        """
        last, params = self._last, gradients.params
        split = last[1] if last is not None and last[0] is params else self._split(params)
        only = split.only
        if only is not None:
            return only.step(gradients, move)
        if split.fused:
            return self._mixed.step(gradients, split, move)
        self._hand_over()
        self.general.step(gradients)
        return False

    def uses_waiting(self) -> bool:
        """Whether the step may begin with gradients from before its closure.

        All optimizers of torch evaluate it first.
        """
        return not self._any_fused and not is_torchs(self._inner)

    def _hand_over(self) -> None:
        for path in self._fused.values():
            path.hand_over()

    def step_without_gradients(self, found_inf: Tensor | None = None) -> None:
        """Lets the wrapped optimizer do what it does without gradients: usually nothing.

        Args:
            found_inf: 0-d, what other ranks have found, which the general path waits for: not 0
                means that nobody steps. None: there are no others.
        """
        chosen = self.current()
        general = frozenset(n for n, path in enumerate(chosen) if path.path == "general")
        if general and (found_inf is None or not bool(found_inf)):
            self.general.step_without_gradients(general if len(general) < len(chosen) else None)

    def call_inner(self, adopt: Callable[[], None], method: Callable[[], Any]) -> Any:
        """Calls a method of the wrapped optimizer over masters, and rounds these into weights.

        Args:
            adopt: Makes weights that others wrote to the masters, which are there by then.
            method: A method of the wrapped optimizer.
        """
        check_no_call(self._masters.fused_only)
        self._hand_over()
        return self.general.call_inner(adopt, method)

    def initialise_state(self, gradients: StepGradients) -> None:
        """Makes the optimizer's state and changes no weight."""
        if self._masters.fused_only is None:
            self.general.initialise_state(gradients)
        for path, some in self._split(gradients.params).fused:
            path.plan(some)  # makes what only its steps need

    def step_with_closure(
        self,
        closure: Callable[[], Any],
        collect: Callable[[], StepGradients],
        move: ScaleMove | None,
        first: StepGradients | None,
    ) -> tuple[Any, StepGradients, bool]:
        """Returns the closure's loss, the last gradients, and whether the loss scale has moved.

        Args:
            closure: A user's. If a group is fused it is evaluated once, before the step, as the
                optimizers with a rule do.
            collect: Returns the gradients that it left.
            move: How the loss scale moves, on the fused path.
            first: Gradients that `uses_waiting` asked for, if some waited.
        """
        if not self._any_fused:
            self._hand_over()
            return *self.general.step_with_closure(closure, collect, first), False
        with torch.enable_grad():
            loss = closure()
            gradients = collect()
        if gradients.params:
            return loss, gradients, self.step(gradients, move)
        gradients.agree()
        self.step_without_gradients(gradients.found_inf())
        return loss, gradients, False
