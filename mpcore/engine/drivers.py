"""What those who drive an optimizer ask of it: scalers, trainers' plugins, monitors.

Nothing here syncs with the host. It is for code of this package, and for whoever writes a trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore.engine.external import External
from mpcore.engine.optimizer import MixedPrecisionOptimizer
from mpcore.errors import ArgumentTypeError

#: Wrappers of trainers around each other: Accelerate's around Lightning's does not occur.
_DEEPEST = 4


def unwrapped(optimizer: object) -> MixedPrecisionOptimizer:
    """Returns the wrapper itself, out of what a trainer has put around it.

    Accelerate, Lightning and Fabric hand out objects that hold it as `optimizer`.

    Args:
        optimizer: A `MixedPrecisionOptimizer`, or such an object around one.

    Raises:
        ArgumentTypeError: There is none in it.

    Example:
        >>> from types import SimpleNamespace
        >>> optimizer = MixedPrecisionOptimizer(torch.optim.SGD([torch.ones(2)]))
        >>> unwrapped(SimpleNamespace(optimizer=optimizer)) is optimizer
        True
    """
    held: object = optimizer
    found = None
    for _ in range(_DEEPEST):
        # the innermost: Lightning's object is of the class of what it holds, with a copy of its
        # attributes, of which some are those of long ago
        found = held if isinstance(held, MixedPrecisionOptimizer) else found
        held = getattr(held, "optimizer", None)
    if found is not None:
        return found
    raise ArgumentTypeError(
        "optimizer: expected a mpcore.MixedPrecisionOptimizer, or a trainer's object around one, "
        f"got {type(optimizer).__name__}."
    )


def is_unscaled(optimizer: MixedPrecisionOptimizer) -> bool:
    """Whether `p.grad` shows the unscaled gradients of this step."""
    return optimizer._stage.unscaled


def unscale_by(optimizer: MixedPrecisionOptimizer, scale: Tensor) -> None:
    """Does what `unscale_` does, by the scale of somebody else.

    Args:
        optimizer: Whose gradients.
        scale: What they were scaled by, of one element.
    """
    optimizer._masters.take_over_edits(optimizer.state, optimizer.param_groups)
    nothing = torch.zeros((), device=scale.device)
    optimizer._stage.unscale("GradScaler.unscale_()", External(scale.reshape(()), nothing))


def watch_clips(optimizer: MixedPrecisionOptimizer, outputs: list[Tensor]) -> None:
    """Warns of a clip of what these outputs' backward pass leaves, if it is a clip of scaled ones.

    Args:
        optimizer: Whose gradients are going to be looked at.
        outputs: Scaled.
    """
    optimizer._stage.clip_watch.watch(outputs)


def tell_losses(optimizer: MixedPrecisionOptimizer, losses: Sequence[Tensor | None]) -> None:
    """Tells a monitor of the losses that somebody else has scaled, unless it was told already.

    Args:
        optimizer: Which a monitor may watch.
        losses: Of the passes since the last step, before they were scaled; None: not known.
    """
    watcher = optimizer._stage.watcher
    if watcher is not None and not watcher.has_losses:
        for loss in losses:
            watcher.see_loss(loss)
