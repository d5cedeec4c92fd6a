"""Precision plugins that let Lightning train with `MixedPrecisionOptimizer`. Needs `lightning`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.fabric.plugins
import lightning.pytorch.plugins
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from mpcore.engine import MixedPrecisionOptimizer, is_unscaled
from mpcore.errors import ArgumentError


class MasterWeightsPrecision(lightning.pytorch.plugins.Precision):
    """For `Trainer(plugins=...)`: optimizers scale losses; hooks and clips see what they step with.

    Every `MixedPrecisionOptimizer` of `configure_optimizers` has its own loss scale, skips by
    itself and saves masters and scale with its state. From the last backward pass to the step
    `p.grad` holds the unscaled float32 gradients: `on_before_optimizer_step`, `gradient_clip_val`,
    `configure_gradient_clipping` and `self.clip_gradients` act on these. Other optimizers step as
    ever. Nothing is cast: make the model 16-bit yourself, best by `mpcore.cast_model(self,
    torch.float16, optimizer)` in `configure_optimizers`. No host sync but that of the step.

    Under manual optimization write `self.manual_backward(opt.scale(loss))`: Lightning does not say
    which optimizer a loss is for. A loss that was not scaled is an error in the step.

    Example:
        A module that returns `mpcore.MixedPrecisionOptimizer(...)` is trained by
        `Trainer(plugins=MasterWeightsPrecision(), gradient_clip_val=1.0).fit(module)`.
    """

    precision = "16-true"

    def backward(
        self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Scales the loss of automatic optimization, and runs its backward pass."""
        optimizer = _raw(optimizer)  # None under manual optimization
        if isinstance(optimizer, MixedPrecisionOptimizer):
            tensor = optimizer.scale(tensor)
        super().backward(tensor, model, optimizer, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Runs the closure, unscales, lets hooks and clip see the gradients, and steps or skips."""
        if not isinstance(optimizer, MixedPrecisionOptimizer):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        if _needs_closure(optimizer.inner):
            raise ArgumentError(
                "optimizer_step: expected an optimizer that can step without a closure, got one "
                f"around {type(optimizer.inner).__name__}, which evaluates it itself. Set "
                "automatic_optimization = False and call optimizer.step(closure)."
            )
        result = closure()
        _unscale(optimizer)
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        return result

    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clips unscaled gradients; under manual optimization it is called before the step."""
        _unscale(_raw(optimizer))
        super().clip_gradients(optimizer, *args, **kwargs)


class FabricMasterWeightsPrecision(lightning.fabric.plugins.Precision):
    """For `Fabric(plugins=...)`: `fabric.clip_gradients` acts on unscaled float32 gradients.

    Losses are scaled by `fabric.backward(optimizer.scale(loss))`: Fabric does not say which
    optimizer a loss is for. A loss that was not scaled is an error in the step.

    Example:
        With `Fabric(plugins=FabricMasterWeightsPrecision())`,
        `fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)` clips, and
        leaves an overflow to the step, which skips.
    """

    precision = "16-true"

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Shows unscaled gradients in `p.grad`, unless they are there; no host sync."""
        _unscale(optimizer)


def _needs_closure(inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer evaluates a closure itself, as LBFGS does."""
    closure = inspect.signature(inner.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _raw(optimizer: Any) -> Any:
    """Returns what Lightning has wrapped for its loops."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _unscale(optimizer: Any) -> None:
    if isinstance(optimizer, MixedPrecisionOptimizer) and not is_unscaled(optimizer):
        optimizer.unscale_()
