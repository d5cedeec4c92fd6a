"""Notices a clip of gradients that are still scaled; it makes steps smaller by the loss scale."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from mpcore.base import HostCopy
from mpcore.masters import Groups

_MESSAGE = (
    "gradients were made smaller after the backward pass, while the loss scale was still in them. "
    "A clip there makes steps too small by that factor. Call unscale_() of this optimizer before "
    "torch.nn.utils.clip_grad_norm_ or clip_grad_value_, or its own clip_grad_norm_(max_norm) "
    "instead; in a trainer that clips by itself, use mpcore.GradScaler in place of its own scaler, "
    'and its switch for float16: Accelerate unscales with mixed_precision="fp16" alone. '
    "Nothing is wrong if you averaged gradients by hand."
)


class ClipWatch:
    """Compares one small gradient after each backward pass with what it is at the step.

    Warns once, if values became smaller and none larger; that a norm was taken, with a clip to
    infinity for instance, changes none. No host sync: a GPU's answer is looked at a step later.

    Args:
        groups: The optimizer's param groups.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._warned = False
        self._param: Any = None
        self._before: tuple[Tensor, int, Tensor] | None = None  # gradient, writes, a copy of it
        self._sent: HostCopy | None = None
        self.has_begun = False  # whether the backward pass of what was scaled last has

    def watch(self, scaled: Any) -> None:
        """Has a look at the end of the backward pass of scaled outputs."""
        self.has_begun = False
        if isinstance(scaled, Tensor):
            if scaled.requires_grad:
                scaled.register_hook(_at_the_end(self))  # type: ignore[no-untyped-call]
            return
        for output in scaled:
            self.watch(output)

    def forget(self) -> None:
        """Forgets the gradient of a pass that was stepped or thrown away."""
        self._before = None

    def note(self) -> None:
        """Notes what a backward pass has left."""
        self._before = None
        if self._param is None or self._param.grad is None:
            params = [p for group in self._groups for p in group["params"] if p.grad is not None]
            params = [p for p in params if p.grad.layout == torch.strided and p.numel()]
            self._param = min(params, key=Tensor.numel, default=None)
        if self._param is not None and not self._warned:
            grad = self._param.grad
            self._before = (grad, grad._version, grad.detach().clone())

    def check(self) -> None:
        """Looks whether anybody has written since."""
        noted, self._before = self._before, None
        if self._sent is not None and self._sent.has_arrived():
            self._report(self._sent.values)
            self._sent = None
        if noted is None or self._warned or self._param.grad is not noted[0]:
            return
        grad, writes, before = noted
        if grad._version != writes:
            self._compare(grad, before)

    @torch.no_grad()
    def _compare(self, grad: Tensor, before: Tensor) -> None:
        """Looks whether values became smaller, and none larger."""
        lower = (grad.abs() < before.abs()).any()
        nowhere_higher = (grad.abs() <= before.abs()).all()  # and so nowhere NaN
        found = lower & nowhere_higher
        if found.device.type == "cpu":
            self._report(found)
        elif found.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._sent = HostCopy(found)

    def _report(self, found: Tensor) -> None:
        if bool(found) and not self._warned:
            self._warned = True
            warnings.warn(_MESSAGE, stacklevel=5)


def _at_the_end(watch: ClipWatch) -> Any:
    """Returns a hook of a loss that has `watch` look once its backward pass is over.

    Asked for twice: after what DistributedDataParallel writes at the end of the pass.
    """
    alive = weakref.ref(watch)

    def last() -> None:
        watch = alive()
        if watch is not None:
            watch.note()

    def begin(_: Tensor) -> None:
        watch = alive()
        if watch is not None:
            watch.has_begun = True
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(last))

    return begin
