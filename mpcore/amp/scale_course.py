"""The scale of a GradScaler: settings, course from iteration to iteration, checkpoints."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import _refresh_per_optimizer_state

from mpcore.amp.arguments import (
    EXTRAS,
    LARGEST_INT32,
    NAMES,
    Settings,
    check_bounds,
    check_choices,
    check_count,
    checked_state,
    is_float32,
    widened,
)
from mpcore.amp.scaler_checks import GradChecker
from mpcore.backends import Backend, ScaleMove, reference
from mpcore.base import LARGEST_SCALE, SMALLEST_SCALE, outside_graphs
from mpcore.loss_scale import (
    REFILLS,
    LossScale,
    LossScaleState,
    LossScaleTensors,
    SkipAlarm,
    count_step_,
    tolerated,
)

_T = TypeVar("_T", bound="ScaleCourse")

# what a native loss scale and the constructor call by the same name
_SETTINGS = (
    *("growth_factor", "backoff_factor", "growth_interval", "min_scale", "max_scale"),
    *("hysteresis", "refill", "tolerance", "at_min"),
)


class ScaleCourse(torch.amp.GradScaler):
    """What `mpcore.GradScaler` does that has nothing to do with optimizers; see there."""

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float = SMALLEST_SCALE,
        max_scale: float = LARGEST_SCALE,
        hysteresis: int = 1,
        refill: str = "growth",
        tolerance: float = 0.0,
        at_min: str = "clamp",
        process_group: Any = None,
    ) -> None:
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )
        self._forget_steps()
        self._process_group = process_group
        self._moves = True
        self._own_rule: LossScale | None = None
        self._checker = GradChecker()
        self._alarm = SkipAlarm(at_min)
        self._state: LossScaleTensors | None = None  # made with the scale
        if not self._enabled:
            return
        self._min_scale, self._max_scale = float(min_scale), float(max_scale)
        self._refill, self._tolerance, self._at_min = refill, tolerance, at_min
        check_bounds(self._min_scale, self._max_scale)
        self._hysteresis = check_count("hysteresis", hysteresis)
        check_choices(refill, tolerance, at_min)
        settings = Settings()
        bounds = self._min_scale, self._max_scale
        self._init_scale = settings.scale("init_scale", init_scale, *bounds)
        self._growth_factor = settings.growth_factor(growth_factor)
        self._backoff_factor = settings.backoff_factor(backoff_factor)
        self._growth_interval = settings.growth_interval(growth_interval)
        self._init_state = LossScaleState(self._init_scale, 0, self._hysteresis, 0, 0)
        settings.warn(2)

    def _forget_steps(self) -> None:
        """Makes what is no part of a checkpoint: for the part that knows optimizers."""

    @classmethod
    def of(
        cls: type[_T],
        loss_scale: LossScale,
        device: str = "cuda",
        enabled: bool = True,
        *,
        process_group: Any = None,
    ) -> _T:
        """Returns a scaler whose scale moves as a native loss scale does, or stays.

        Args:
            loss_scale: `DynamicLossScale(...)`, one of its presets, `StaticLossScale(scale)`,
                `NoLossScale()`, whose gradients are still checked, or `HeadroomLossScale(...)`,
                which leaves room above the largest gradient of any dtype.
            device: As for the constructor.
            enabled: Likewise.
            process_group: Likewise.
        """
        if not isinstance(loss_scale, LossScale):
            raise TypeError(
                "loss_scale: expected DynamicLossScale, HeadroomLossScale, StaticLossScale or "
                f"NoLossScale, got {type(loss_scale).__name__}."
            )
        own = vars(loss_scale)  # not what the class has for all kinds
        known = {name: own[name] for name in _SETTINGS if name in own}
        scale = loss_scale.first().scale
        scaler = cls(device, scale, enabled=enabled, process_group=process_group, **known)
        scaler._moves = loss_scale.moves
        if loss_scale.moves and loss_scale.growth_interval is None:  # not as torch's moves
            scaler._own_rule = loss_scale
            scaler._checker = GradChecker(finds_largest=loss_scale.wants_largest)
        return scaler

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._state = LossScaleTensors.from_state(self._init_state, dev)

    @outside_graphs
    def scale(self, outputs: Any) -> Any:
        """Multiplies outputs by the scale, 16-bit ones in float32; no host sync.

        Args:
            outputs: A tensor, or an iterable of such outputs.

        Raises:
            ValueError: It is something else, as in torch.
        """
        return super().scale(widened(outputs)) if self._enabled else outputs

    @outside_graphs
    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Moves the scale by one iteration, or sets it; no host sync.

        Args:
            new_scale: A number, or a tensor of one element on the scaler's kind of device; cut to
                the bounds, a number after a warning. None: move.

        Raises:
            AssertionError: At the wrong moment, or the tensor is of another kind, as in torch.
        """
        if not self._enabled:
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        if new_scale is not None:
            if not isinstance(new_scale, Tensor):
                settings = Settings()
                bounds = self._min_scale, self._max_scale
                new_scale = settings.scale("new_scale", new_scale, *bounds)
                settings.warn(4)  # two frames are Dynamo's
            elif new_scale.numel() == 1:
                new_scale = new_scale.reshape(())
            super().update(new_scale)
            self._checks_done()
            scale.nan_to_num_(nan=self._min_scale).clamp_(self._min_scale, self._max_scale)
            return
        found = [
            found_inf.to(scale.device, non_blocking=True) != 0
            for state in self._per_optimizer_states.values()
            for found_inf in state["found_inf_per_device"].values()
        ]
        if not found:
            raise AssertionError("No inf checks were recorded prior to update.")
        self._move(scale, tracker, torch.stack(found).any().int())
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        self._checks_done()
        if self._state is not None:
            self._alarm.note(self._state.counters)  # last: it may raise

    def _checks_done(self) -> None:
        """Ends an iteration: for the part that knows optimizers."""

    def _move(self, scale: Tensor, tracker: Tensor, found_inf: Tensor) -> None:
        if self._state is None:  # somebody made the scale without scale()
            self._state = LossScaleTensors.from_state(self._init_state, scale.device)
        # these two are torch's, which others read and write
        state = self._state = replace(self._state, scale=scale, growth_tracker=tracker)
        if self._own_rule is not None:
            largest = self._largest_gradient(scale.device)
            self._own_rule.advance_(state, found_inf, largest=largest)
        elif self._moves:
            move = ScaleMove(
                scale=scale,
                growth_tracker=tracker,
                overflows_left=state.overflows_left,
                counters=state.counters,
                growth_factor=self._growth_factor,
                backoff_factor=self._backoff_factor,
                growth_interval=min(self._growth_interval, LARGEST_INT32),
                min_scale=self._min_scale,
                max_scale=self._max_scale,
                hysteresis=min(self._hysteresis, LARGEST_INT32),
                refill=REFILLS[self._refill],
                tolerance=tolerated(self._tolerance),
            )
            backend = self._backend_for(scale.device)
            backend.update_scale_(move, found_inf)
        else:
            count_step_(state.counters, found_inf)

    def _largest_gradient(self, device: torch.device) -> Tensor:
        """Returns the largest one of the iteration: for the part that knows optimizers."""
        return torch.zeros((), dtype=torch.float64, device=device)

    def _backend_for(self, device: torch.device) -> Backend:
        # kernels take float32 factors that move a scale; torch's take 0.8 and 1.0 as they are
        factors = (self._growth_factor, self._backoff_factor)
        exact = all(is_float32(factor) and factor != 1.0 for factor in factors)
        return self._checker.backend(device) if exact else reference

    @property
    def steps(self) -> int:
        """Iterations that `update` has counted; syncs."""
        return self._reading().steps

    @property
    def skipped_steps(self) -> int:
        """Iterations in which an optimizer was skipped; syncs."""
        return self._reading().skipped_steps

    @property
    def skips_in_a_row(self) -> int:
        """The last of them, without a clean one between; syncs."""
        return self._reading().skips_in_a_row

    def _reading(self) -> LossScaleState:
        """Returns counters and peaks as numbers; syncs."""
        if not self._enabled:
            return LossScaleState(1.0, 0, 0, 0, 0)
        return self._init_state if self._state is None else self._state.to_state()

    def set_growth_factor(self, new_factor: float) -> None:
        """Sets the growth factor; below 1 or too large it counts as 1, after a warning."""
        if self._enabled:
            settings = Settings()
            new_factor = settings.growth_factor(new_factor)
            settings.warn(2)
        super().set_growth_factor(new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Sets the backoff factor; cut to [2^-126, 1], after a warning."""
        if self._enabled:
            settings = Settings()
            new_factor = settings.backoff_factor(new_factor)
            settings.warn(2)
        super().set_backoff_factor(new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Sets the growth interval; a tracker beyond it makes the scale grow next.

        With one below 1 the scale never grows, as in torch, after a warning.
        """
        if self._enabled:
            settings = Settings()
            new_interval = settings.growth_interval(new_interval)
            settings.warn(2)
        super().set_growth_interval(new_interval)

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's five entries, and bounds, hysteresis and counters; syncs.

        `torch.amp.GradScaler` loads it too and ignores what it does not know.
        """
        if not self._enabled:
            return {}
        extras = {name: getattr(self, f"_{name}") for name in EXTRAS}
        reading = self._reading()
        counters = {key: getattr(reading, name) for key, name in NAMES.items()}
        return {**super().state_dict(), **extras, **counters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of `torch.amp.GradScaler`; nothing changes if it fails.

        What torch takes and we cannot be is brought back to our bounds after a warning: its scale
        may be 0 or infinite. A scale that never moves stays what it is.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            RuntimeError: It is empty, as in torch.
            KeyError: One of torch's entries is missing.
            AssertionError: A number is impossible.
        """
        if not self._enabled or not state_dict:
            super().load_state_dict(state_dict)
            return
        fallback = {name: getattr(self, f"_{name}") for name in EXTRAS}
        settings = Settings()
        loaded = checked_state({**fallback, **state_dict}, settings)
        settings.warn(2)  # first: a warning may be an error, and then nothing has changed
        if not self._moves:
            loaded["scale"] = self.get_scale()
        super().load_state_dict(loaded)
        for name in EXTRAS:
            setattr(self, f"_{name}", loaded[name])
        self._init_state = LossScaleState(
            scale=loaded["scale"],
            growth_tracker=loaded["_growth_tracker"],
            **{name: loaded[key] for key, name in NAMES.items()},
        )
        self._alarm = self._new_alarm(self._init_state)
        if self._state is not None:
            self._state.assign_(self._init_state)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: tensors are made again with the next loss."""
        state: dict[str, Any] = super().__getstate__()
        if self._enabled:
            state["_init_state"] = reading = self._reading()
            state["_alarm"] = self._new_alarm(reading)
        checker = GradChecker(self._checker.finds_largest)
        return {**state, "_state": None, "_checker": checker}

    def _new_alarm(self, state: LossScaleState) -> SkipAlarm:
        return SkipAlarm(self._at_min, overflows_at_min=state.overflows_at_min)
