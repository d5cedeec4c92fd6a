"""A loss scale of ours for `compile` and `fit` of Keras 3 on its torch backend. Needs `keras`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch

from mpcore.errors import ArgumentError
from mpcore.loss_scale import (
    COUNTERS,
    DynamicLossScale,
    HeadroomLossScale,
    LossScale,
    LossScaleState,
    NoLossScale,
    StaticLossScale,
    check_loss_scale,
    initial_state,
    new_alarm,
    next_state,
    resumed_state,
)

_KINDS = {
    kind.__name__: kind
    for kind in (DynamicLossScale, HeadroomLossScale, StaticLossScale, NoLossScale)
}
_REAL = ("scale", "peak", "peak_before")  # of a state; what else is in it are counts


@keras.saving.register_keras_serializable("mpcore")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Takes the place of Keras's own: the scale has bounds, hysteresis, and counts its skips.

    Under the policy "mixed_float16" `compile` leaves it as it is; Keras's own, which it would put
    around any other optimizer, can reach 0 and infinity. A step whose gradients are not finite,
    before or after they are divided by the scale, is skipped. Syncs with the host once a step, as
    Keras's does. Scale and counters are saved with the optimizer's variables.

    Args:
        inner_optimizer: Any Keras optimizer; clips are its own, and see unscaled gradients.
        loss_scale: `mpcore.DynamicLossScale(...)`, or Headroom-, Static-, `NoLossScale`.
        name: For Keras.

    Raises:
        ArgumentTypeError: `loss_scale` is something else.
        ArgumentError: The backend of Keras is not torch.

    Example:
        `model.compile(optimizer=LossScaleOptimizer(keras.optimizers.AdamW(1e-3)), loss="mse")`
    """

    built: bool

    def __init__(
        self,
        inner_optimizer: Any,
        loss_scale: LossScale = DynamicLossScale(),  # noqa: B008 - a frozen value
        name: str | None = None,
    ) -> None:
        if keras.backend.backend() != "torch":
            raise ArgumentError(
                f"Keras: expected the backend torch, got {keras.backend.backend()}. Set "
                "KERAS_BACKEND=torch before keras is imported."
            )
        first = initial_state(check_loss_scale(loss_scale))
        super().__init__(inner_optimizer, initial_scale=first.scale, name=name)
        self.loss_scaling = loss_scale
        self._now = first
        self._alarm = new_alarm(loss_scale, 0)

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by; no host sync."""
        return self._now.scale

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones included; no host sync."""
        return self._now.steps

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite; no host sync."""
        return self._now.skipped_steps

    def build(self, var_list: Sequence[Any]) -> None:
        """Makes the variables, among them one for the loss scale's state."""
        super().build(var_list)
        self._saved = self.add_variable(
            shape=(len(LossScaleState._fields),),
            dtype="float64",  # which holds every counter exactly
            initializer="zeros",
            aggregation="none",
            name="loss_scale_state",
        )
        self._write()

    def scale_loss(self, loss: Any) -> Any:
        """Returns a loss times the scale."""
        return keras.ops.multiply(loss, self._now.scale)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Unscales and steps or skips; then moves the loss scale."""
        if not self.built:
            self.build(trainable_variables or [])
            self.built = True
        variables = trainable_variables or self._trainable_variables
        unscaled = [
            grad
            if grad is None or self._overwrite_variable_with_gradient(variable)
            else keras.ops.divide(grad, self._now.scale)
            for grad, variable in zip(grads, variables, strict=True)
        ]
        found_inf = not bool(self.check_finite(unscaled))
        largest = self._largest(unscaled) if self.loss_scaling.wants_largest else 0.0
        if not found_inf:
            self.inner_optimizer.apply(unscaled, trainable_variables)
        self._now = next_state(self.loss_scaling, self._now, found_inf=found_inf, largest=largest)
        self._write()
        counters = [getattr(self._now, name) for name in COUNTERS]
        self._alarm.note(torch.tensor(counters))  # last: it may raise

    def load_own_variables(self, store: Any) -> None:
        """Takes what was saved; the settings of the loss scale stay those of this object."""
        super().load_own_variables(store)
        numbers = self._saved.numpy().tolist()
        values = dict(zip(LossScaleState._fields, numbers, strict=True))
        counts = {name: int(value) for name, value in values.items() if name not in _REAL}
        saved = LossScaleState(**{**values, **counts})
        self._now = resumed_state(self.loss_scaling, saved)
        self._alarm = new_alarm(self.loss_scaling, self._now.overflows_at_min)
        self._write()

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` makes another one of, the loss scale by its kind."""
        kind = type(self.loss_scaling)
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        scale = {"kind": kind.__name__, **vars(self.loss_scaling)}
        return {"name": self.name, "inner_optimizer": inner, "loss_scale": scale}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Makes one of what `get_config` has returned.

        Raises:
            ArgumentError: The loss scale is of a class of your own.
        """
        given = dict(config["loss_scale"])
        kind = given.pop("kind")
        if kind not in _KINDS:
            raise ArgumentError(
                f"from_config: expected a loss scale of {', '.join(_KINDS)}, got {kind}. Load the "
                "model with compile=False, and compile it with an optimizer that you have made."
            )
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects)
        return cls(inner, _KINDS[kind](**given), name=config["name"])

    def _write(self) -> None:
        """Brings the variables in line, Keras's own scale as well."""
        self._saved.assign(list(map(float, self._now)))
        self.dynamic_scale.assign(self._now.scale)

    @staticmethod
    def _largest(grads: Sequence[Any]) -> float:
        norms = [keras.ops.max(keras.ops.abs(grad)) for grad in grads if grad is not None]
        return float(keras.ops.max(keras.ops.stack(norms))) if norms else 0.0
