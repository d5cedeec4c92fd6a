"""Gradients that wait for a step when a closure comes: it adds to them, or drops them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor


class WaitingGradients:
    """Gradients of a scaled loss that nobody stepped with before `step(closure)`; no host sync.

    A closure that clears no gradients adds to them. One that does loses them. Any optimizer of
    torch loses them too; but here sums and clips go with them, so it is said.
    """

    def __init__(self) -> None:
        self.forget()

    @property
    def exist(self) -> bool:
        """Whether any may be waiting."""
        return self._any or self._whole

    def forget(self) -> None:
        """Forgets them: they were dropped on purpose, or the step is over."""
        self._whole = self._any = False
        self._grads: list[tuple[Tensor, Tensor]] = []

    def note(self, params: Sequence[Tensor], *, whole: bool, scaled: bool) -> None:
        """Notes what waits when a closure is about to run.

        Args:
            params: Those whose `p.grad` may wait.
            whole: Whether sums, or gradients that were clipped or unscaled, wait as well.
            scaled: Whether they are of a loss that went through `scale`; what others have left
                there may be used, but to drop it needs no word.
        """
        self._whole = whole
        grads = [(param, param.grad) for param in params if param.grad is not None]
        self._any = bool(grads)
        self._grads = grads if scaled else []

    def take(self, *, whole: bool) -> bool:
        """Returns whether gradients wait that will be used now, and forgets them.

        Args:
            whole: Whether also if sums wait, or what was clipped or unscaled.
        """
        waits = whole if self._whole else self._any
        if waits:
            self.forget()
        return waits

    def check(self) -> None:
        """Warns if others (`model.zero_grad()`) have dropped them, whom sums do not mind."""
        if not self._whole and any(param.grad is not grad for param, grad in self._grads):
            self.warn_if_any()
        self.forget()

    def warn_if_any(self) -> None:
        """Warns that they are being dropped, if there are any."""
        waited = self._whole or bool(self._grads)
        self.forget()
        if waited:
            warnings.warn(
                "step(closure): the closure has cleared gradients of a backward pass before it, "
                "which no step has used. To step with them, call step() without a closure, or "
                "leave zero_grad() out of the closure, which then adds to them; if they were not "
                "meant, call zero_grad() before step(closure).",
                stacklevel=5,
            )
