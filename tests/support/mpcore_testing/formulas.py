"""One step of each optimizer in NumPy float64, from the papers and torch's documentation.

Nothing is shared with `mpcore.updates`: no class, no order of operations, no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any


@dataclass
class Formula:
    """A float64 parameter and its state.

    Attributes:
        name: "Adam", "AdamW", "SGD", "Adagrad" or "Lion".
        options: As for the optimizer.
        param: float64.
        state: Moments by torch's names, float64.
        t: Steps so far.
        size: The magnitude of the last update's terms, to measure errors by.
        certain: Where no sign that Lion took was a matter of rounding.
    """

    name: str
    options: dict[str, Any]
    param: Array
    state: dict[str, Array] = field(default_factory=dict)
    t: int = 0
    size: Array = 0.0
    certain: Array = True

    def step(self, grad: Array) -> None:
        """Updates `param` by a float64 gradient."""
        self.t += 1
        option = self.options.get
        g = -grad if option("maximize") else grad
        decay = option("weight_decay", 0.01 if self.name == "AdamW" else 0.0)
        if self.name in ("AdamW", "Lion"):
            self.param = self.param - option("lr") * decay * self.param
        else:
            g = g + decay * self.param
        getattr(self, f"_{self.name.lower()}")(g, option)

    def _moment(self, key: str, beta: float, value: Array) -> Array:
        old = self.state.get(key, np.zeros_like(value))
        self.state[key] = beta * old + (1 - beta) * value
        return self.state[key]

    def _move(self, update: Array, size: Array) -> None:
        self.param, self.size = self.param - update, np.abs(size)

    def _adam(self, g: Array, option: Any) -> None:
        beta1, beta2 = option("betas", (0.9, 0.999))
        size = beta1 * np.abs(self.state.get("exp_avg", np.zeros_like(g)))
        size = size + (1 - beta1) * np.abs(g)
        mean = self._moment("exp_avg", beta1, g)
        square = self._moment("exp_avg_sq", beta2, g * g)
        if option("amsgrad"):
            largest = self.state.get("max_exp_avg_sq", np.zeros_like(g))
            square = self.state["max_exp_avg_sq"] = np.maximum(largest, square)
        root = np.sqrt(square / (1 - beta2**self.t)) + option("eps", 1e-8)
        factor = option("lr") / (1 - beta1**self.t) / root
        self._move(factor * mean, factor * size)

    _adamw = _adam

    def _sgd(self, g: Array, option: Any) -> None:
        step, size = g, np.abs(g)
        if option("momentum", 0.0):
            old = self.state.get("momentum_buffer")
            rest = 1 - option("dampening", 0.0)
            velocity = g if old is None else option("momentum") * old + rest * g
            size = size + (0 if old is None else np.abs(old))
            self.state["momentum_buffer"] = velocity
            step = g + option("momentum") * velocity if option("nesterov") else velocity
        self._move(option("lr") * step, 2 * option("lr") * size)

    def _adagrad(self, g: Array, option: Any) -> None:
        total = self.state["sum"] = self.state.get("sum", np.zeros_like(g)) + g * g
        rate = option("lr") / (1 + (self.t - 1) * option("lr_decay", 0.0))
        update = rate * g / (np.sqrt(total) + option("eps", 1e-10))
        self._move(update, update)

    def _lion(self, g: Array, option: Any) -> None:
        beta1, beta2 = option("betas", (0.9, 0.99))
        old = self.state.get("exp_avg", np.zeros_like(g))
        direction = beta1 * old + (1 - beta1) * g
        size = beta1 * np.abs(old) + (1 - beta1) * np.abs(g)
        self.certain = self.certain & ((np.abs(direction) > 2.0**-16 * size) | (size == 0))
        self.state["exp_avg"] = beta2 * old + (1 - beta2) * g
        self._move(option("lr") * np.sign(direction), option("lr"))
