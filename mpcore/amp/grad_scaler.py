"""`GradScaler`: stands in for `torch.amp.GradScaler`, with a scale that never breaks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from mpcore.amp.scale_course import ScaleCourse
from mpcore.amp.scaled_losses import ScaledLosses
from mpcore.amp.scaler_checks import GradCheck
from mpcore.amp.scaler_clip import check_clip, clip_
from mpcore.amp.scaler_momentum import begin_momentum
from mpcore.amp.scaler_ranks import largest_of_ranks, process_groups
from mpcore.amp.scaler_step import ScalerStep
from mpcore.amp.watched_steps import is_watched, step_watched
from mpcore.base import SIXTEEN_BIT, outside_graphs
from mpcore.engine import MixedPrecisionOptimizer, is_unscaled, unscale_by, watch_clips
from mpcore.errors import ArgumentError


class GradScaler(ScaleCourse):
    """`torch.amp.GradScaler` with bounds, hysteresis and answers; syncs where that one does.

    Constructor, methods, errors, pickling and checkpoints are torch's: loops, libraries and files
    made for it work, in both directions. Different on purpose:

    - The scale stays within [`min_scale`, `max_scale`]: it never reaches 0 or infinity.
    - A gradient overflows if it or its unscaled value is not finite, and any number of overflows
      on any number of devices skips an optimizer, fused ones too.
    - The scale grows also if the tracker is beyond the interval, after the interval was lowered.
    - A closure is refused as a positional argument too.
    - 16-bit gradients are unscaled, in place, after a warning.
    - The momentum of a fused SGD whose first step is skipped begins with the next one.
    - A 16-bit loss is multiplied in float32.

    Args:
        device: As for torch.
        init_scale: Any number. This and the next three are what torch takes: where the scale
            cannot follow, they are brought within bounds, and one warning says so.
        growth_factor: Above 1.
        backoff_factor: Below 1.
        growth_interval: Iterations without an overflow before the scale grows; below 1: never.
        enabled: As for torch.
        min_scale: Floor, at least 2^-126.
        max_scale: Ceiling, at most 2^126.
        hysteresis: Overflows tolerated before the scale backs off: see `DynamicLossScale`.
        refill: When they are tolerated anew: see there.
        tolerance: Share of iterations that may overflow: see there.
        at_min: What happens at `min_scale`: see there; "raise" raises from `update`.
        process_group: Ranks that skip together, where each holds a part of the parameters as plain
            tensors (FSDP1). DTensors (FSDP2) need none: their meshes say it. Copies forget it.

    Raises:
        AssertionError: torch refuses a number, it is NaN, or a bound or hysteresis is impossible.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> scaler = GradScaler("cpu", init_scale=8.0, min_scale=4.0)
        >>> for factor in (1.0, float("inf")):
        ...     optimizer.zero_grad()
        ...     scaler.scale((weight * factor).sum()).backward()
        ...     scaler.step(optimizer)
        ...     scaler.update()
        >>> weight.tolist(), scaler.get_scale()
        ([0.5, 0.5], 4.0)
        >>> scaler.last_step.skipped, scaler.last_step.overflowed()
        (True, ['group 0, parameter 0, [2]'])
    """

    def _forget_steps(self) -> None:
        """Makes what is no part of a checkpoint."""
        self._checks: dict[int, GradCheck] = {}
        self._largest: list[Tensor] = []  # gradients of this iteration
        # by identity: an optimizer may compare by value, and then has no hash
        self._last: dict[int, tuple[Callable[[], Any], ScalerStep]] = {}
        self._last_step: ScalerStep | None = None
        self._losses = ScaledLosses()  # of this iteration
        self._warned = False

    @outside_graphs
    def scale(self, outputs: Any) -> Any:
        """Multiplies outputs by the scale, 16-bit ones in float32; no host sync.

        Of each `MixedPrecisionOptimizer` that this scaler has stepped a small gradient is copied
        after the backward pass, to warn of a clip before `unscale_`.

        Args:
            outputs: A tensor, or an iterable of such outputs.

        Raises:
            ValueError: It is something else, as in torch.
        """
        scaled = super().scale(outputs)
        listed = scaled if isinstance(scaled, (list, tuple)) else [scaled]
        tensors = [each for each in listed if isinstance(each, Tensor)]  # others are made late
        for alive, _ in self._last.values():
            optimizer = alive()
            if isinstance(optimizer, MixedPrecisionOptimizer):
                watch_clips(optimizer, tensors)
        if self._enabled:
            self._losses.note(outputs)
        return scaled

    @outside_graphs
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides an optimizer's gradients by the scale in place and checks them; no host sync.

        A `MixedPrecisionOptimizer` shows them in `p.grad` in float32 until its step, those of
        16-bit parameters too: clip `model.parameters()` as ever.

        Args:
            optimizer: What owns them.

        Raises:
            AssertionError, RuntimeError: At the wrong moment, as in torch.
            StageError: It is a `MixedPrecisionOptimizer` that has scaled the loss itself.
        """
        self._forget_thrown(optimizer)
        self._losses.tell(optimizer)
        super().unscale_(optimizer)

    @outside_graphs
    def clip_grad_norm_(
        self, optimizers: Sequence[torch.optim.Optimizer], max_norm: float
    ) -> Tensor:
        """Clips the global 2-norm over several optimizers, which then skip together; no host sync.

        For one loss whose parameters several optimizers share, as Muon and AdamW do. Those whose
        gradients are still scaled are unscaled first. If a gradient of one is not finite, none
        steps: clipped by a norm that is not finite, the others would step with 0 or NaN.

        Args:
            optimizers: A list; each is stepped with `step` afterwards.
            max_norm: Above 0.

        Returns:
            The norm before clipping, 0-d; not finite if the steps will be skipped.

        Raises:
            AssertionError, RuntimeError: At the wrong moment, as from `unscale_`.
            ArgumentError: `max_norm` is not above 0, an optimizer is there twice or two share a
                parameter, one is a DTensor, or the scaler has a `process_group`.
            ArgumentTypeError: `optimizers` is no list of optimizers, or `max_norm` is no number.

        Example:
            >>> import mpcore
            >>> weights = [torch.nn.Parameter(torch.zeros(1).half()) for _ in range(2)]
            >>> first, second = (
            ...     mpcore.MixedPrecisionOptimizer(torch.optim.SGD([w], lr=1.0)) for w in weights
            ... )
            >>> scaler = mpcore.GradScaler("cpu", init_scale=8.0)
            >>> scaler.scale((weights[0] * 3 + weights[1] * 4).sum()).backward()
            >>> scaler.clip_grad_norm_([first, second], 1.0)
            tensor(5.)
            >>> for optimizer in (first, second):
            ...     scaler.step(optimizer)
            >>> scaler.update()
            >>> [round(w.item(), 3) for w in weights]
            [-0.6, -0.8]
        """
        params = check_clip(optimizers, max_norm)
        if self._process_group is not None:
            raise ArgumentError(
                "GradScaler.clip_grad_norm_: expected a scaler without process_group, whose ranks "
                "hold parts of parameters. Clip by the method of the module that cut them."
            )
        if not self._enabled:
            return clip_(params, max_norm, [])[0]
        for optimizer in optimizers:
            self._forget_thrown(optimizer)
            if self._per_optimizer_states[id(optimizer)]["stage"] is not OptState.UNSCALED:
                self.unscale_(optimizer)
        states = [self._per_optimizer_states[id(optimizer)] for optimizer in optimizers]
        found = [flag for state in states for flag in state["found_inf_per_device"].values()]
        norm, found_inf = clip_(params, max_norm, found)
        for state in states:
            flags = state["found_inf_per_device"]
            state["found_inf_per_device"] = {
                device: found_inf.to(device, non_blocking=True) for device in flags
            }
        return norm

    def _forget_thrown(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets an `unscale_` whose gradients were thrown away: those of now are scaled."""
        if not self._enabled or not isinstance(optimizer, MixedPrecisionOptimizer):
            return
        states = self._per_optimizer_states
        if states[id(optimizer)]["stage"] is OptState.UNSCALED and not is_unscaled(optimizer):
            del states[id(optimizer)]

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        """Unscales and checks; one flag for all devices: several would be added up."""
        groups = optimizer.param_groups
        if isinstance(optimizer, MixedPrecisionOptimizer):
            unscale_by(optimizer, self._current())
            found = self._checker.look(groups, torch.ones_like(inv_scale))
            return self._note(optimizer, found, found_inf.device)
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not self._warned and any(grad.dtype in SIXTEEN_BIT for grad in grads):
            self._warned = True
            warnings.warn(
                "GradScaler unscales 16-bit gradients in place, where small ones become 0; "
                "last_step.flushed counts them. mpcore.MixedPrecisionOptimizer loses none.",
                stacklevel=6,
            )
        return self._note(optimizer, self._checker.unscale_(groups, inv_scale), found_inf.device)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Checks the gradients of an optimizer that unscales them itself; changes none."""
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        coefficient = scale.double().reciprocal().float()
        check = self._checker.look(optimizer.param_groups, coefficient)
        found: Any = self._note(optimizer, check, scale.device)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        result: dict[str, Any] = found
        return result

    def _note(
        self, optimizer: torch.optim.Optimizer, check: GradCheck, home: torch.device
    ) -> dict[torch.device, Tensor]:
        self._checks[id(optimizer)] = check
        ranks = process_groups(optimizer, self._process_group)
        if self._own_rule is not None:
            self._largest.append(largest_of_ranks(check.largest_gradient(home), ranks))
        if not check.params and not ranks:
            return {}
        return {home: largest_of_ranks(check.found_inf(home), ranks)}

    @outside_graphs
    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscales unless that is done, and steps or skips; syncs unless the optimizer is fused.

        The first step of a fused SGD with dampening syncs, too: see `mpcore.amp.scaler_momentum`.
        So does one whose `optimizer.step` was replaced by somebody other than torch's schedulers:
        trainers do that to see whether it is called. Where it skips, it is not.

        Args:
            optimizer: What steps.
            args: For its `step`; no closure.
            kwargs: Likewise.

        Returns:
            What its `step` returned; None if it was skipped: `last_step.skipped` tells.

        Raises:
            AssertionError, RuntimeError: At the wrong moment, or with a closure, as in torch.
        """
        if self._enabled and any(callable(arg) for arg in args):
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._forget_thrown(optimizer)
        self._losses.tell(optimizer)
        unwritten = begin_momentum(optimizer) if self._enabled else []
        result: float | None
        if self._enabled and is_watched(optimizer):
            result = self._step_watched(optimizer, *args, **kwargs)
        else:
            result = super().step(optimizer, *args, **kwargs)
        if self._enabled:
            state = self._per_optimizer_states[id(optimizer)]
            check = self._checks.pop(id(optimizer), GradCheck())
            found = list(state["found_inf_per_device"].values())
            groups = getattr(optimizer, "param_groups", [])
            self._last_step = ScalerStep(found, check, groups, self._current().clone())
            self._last[id(optimizer)] = (_alive(optimizer), self._last_step)
            if unwritten and self._last_step.skipped:
                for param in unwritten:
                    optimizer.state[param].pop("momentum_buffer", None)
        return result

    def _step_watched(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """What torch's `step` does with an optimizer that skips by itself, but for the skip."""
        state = self._per_optimizer_states[id(optimizer)]
        if "closure" in kwargs or state["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)  # which refuses
        scale = self._current()
        grad_scale = getattr(optimizer, "grad_scale", None)
        if state["stage"] is OptState.READY:
            self._check_inf_per_device(optimizer)
            grad_scale = scale if grad_scale is None else scale * grad_scale
        found = [flag.to(scale.device) for flag in state["found_inf_per_device"].values()]
        found_inf = torch.stack([torch.zeros_like(scale), *found]).amax()
        result = step_watched(optimizer, (grad_scale, found_inf), *args, **kwargs)
        state["stage"] = OptState.STEPPED
        return result

    def _checks_done(self) -> None:
        self._checks.clear()
        self._largest.clear()
        self._losses.clear()
        self._last = {key: kept for key, kept in self._last.items() if kept[0]() is not None}

    def _largest_gradient(self, device: torch.device) -> Tensor:
        seen = [super()._largest_gradient(device)]
        seen += (largest.to(device, non_blocking=True) for largest in self._largest)
        return torch.stack(seen).amax()

    def _current(self) -> Tensor:
        return self._check_scale_growth_tracker("step")[0]

    @property
    def last_step(self) -> ScalerStep | None:
        """What the last `step` did, until the next one; each answer syncs when it is read."""
        return self._last_step

    def last_step_of(self, optimizer: torch.optim.Optimizer) -> ScalerStep | None:
        """Returns what the last `step` of one optimizer did; None before its first."""
        alive, step = self._last.get(id(optimizer), (None, None))
        return step if alive is not None and alive() is optimizer else None

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: no results, which hold the parameters of optimizers."""
        state: dict[str, Any] = super().__getstate__()
        state["_process_group"] = None
        for name in ("_checks", "_largest", "_last", "_last_step", "_losses", "_warned"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_steps()


def _alive(optimizer: Any) -> Callable[[], Any]:
    """Returns what returns `optimizer` as long as it exists."""
    try:
        return weakref.ref(optimizer)
    except TypeError:  # of a class with slots
        return lambda: optimizer
