"""What `unscale_` shows: the float32 gradients that will be stepped with, in the model's `p.grad`.

torch refuses a gradient of another dtype than its parameter's unless `grad_dtype` (torch 2.10 and
newer) says otherwise; before, `.data` of a gradient could be replaced by one of another dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpcore.base import grads_of, laid_out_like, own_memory, writes_to
from mpcore.masters import Masters

#: Whether tensors say which dtype their gradients have.
HAS_GRAD_DTYPE = hasattr(Tensor, "grad_dtype")


@dataclass
class _Shown:
    """A parameter that shows another gradient than its own, and what is needed to undo that."""

    param: Any
    own: Tensor | None
    own_dtype: torch.dtype | None
    own_values: Tensor | None  # where `.data` of the gradient itself was replaced
    dropped: bool = False


class Exposure:
    """The gradients of one step while they are in `p.grad`; nothing here syncs with the host.

    What users do to `p.grad` meanwhile is taken over by `take_edits`: values, another tensor in
    its place. `end` puts the model's own 16-bit tensors back, the very objects; a gradient that
    was dropped stays dropped.

    Args:
        params: Parameters that have a gradient; masters of 16-bit ones have theirs in float32.
        masters: Where the masters are.
        sees_pass: Called with one of them when a backward pass comes to it; raises to stop it.
    """

    def __init__(
        self, params: Sequence[Tensor], masters: Masters, sees_pass: Callable[[Tensor], None]
    ) -> None:
        self._masters = masters
        self._shown: list[_Shown] = []
        self._hooks: list[Any] = []
        self._seen: dict[Tensor, tuple[Tensor, int]] = {}
        try:
            for param in params:
                if masters.of(param) is not param:
                    self._show(param, masters.of(param))
            self._watch(params, sees_pass)
        except BaseException:
            self.end(put_all_back=True)
            raise
        self.note(params)

    def _show(self, param: Any, master: Tensor) -> None:
        own: Any = param.grad
        unscaled: Any = master.grad
        if HAS_GRAD_DTYPE or own is None:
            dtype = param.grad_dtype if HAS_GRAD_DTYPE else None
            self._shown.append(_Shown(param, own, dtype, None))
            param.grad = None
            if HAS_GRAD_DTYPE:
                param.grad_dtype = None
            else:
                own = torch.zeros_like(param)
                own.data = unscaled
                unscaled = own
            param.grad = unscaled
        else:
            self._shown.append(_Shown(param, own, None, own.data))
            own.data = unscaled
        master.grad = param.grad

    def _watch(self, params: Sequence[Tensor], sees_pass: Callable[[Tensor], None]) -> None:
        see = weakref.WeakMethod(sees_pass)  # a parameter must not keep its optimizer alive

        def look(param: weakref.ref[Tensor], _: Tensor) -> None:
            alive, there = see(), param()
            if alive is not None and there is not None:
                alive(there)

        each: Sequence[Any] = params
        some = [param for param in each if param.requires_grad]
        self._hooks += [p.register_hook(partial(look, weakref.ref(p))) for p in some]

    def note(self, params: Sequence[Tensor]) -> None:
        """Notes that what `params` show now is known: what is written later is an edit."""
        grads = grads_of(params)
        writes = writes_to(grads)
        self._seen = {p: (g, n) for p, g, n in zip(params, grads, writes, strict=True)}

    def take_edits(self, params: Sequence[Tensor]) -> bool:
        """Makes what `params` show their gradients; returns whether anything was written.

        Args:
            params: Those that still have a gradient.
        """
        edited = False
        grads = grads_of(params)
        for param, grad, now in zip(params, grads, writes_to(grads), strict=True):
            known, writes = self._seen.get(param, (None, 0))
            master = self._masters.of(param)
            fits = (
                grad.dtype == master.dtype
                and grad.stride() == self._masters.layout_of(param).stride()
                and master.grad is grad
            )
            if grad is known and now == writes and fits:
                continue
            edited = True
            if not fits:
                self._replace(param, master, grad)
        return edited

    @torch.no_grad()
    def _replace(self, param: Tensor, master: Tensor, grad: Tensor) -> None:
        """Makes a tensor that somebody put into `p.grad` one that can be stepped with."""
        there = grad
        grad = own_memory(param, grad.detach() if grad.requires_grad else grad)
        grad = grad if grad.dtype == master.dtype else grad.to(master.dtype)
        grad = laid_out_like(self._masters.layout_of(param), grad)
        if HAS_GRAD_DTYPE or grad.dtype == param.dtype:
            param.grad = grad
        else:
            there.data = grad
            grad = there
        master.grad = grad

    @property
    def is_dropped(self) -> bool:
        """Whether no gradient is left: somebody else has thrown the pass away."""
        return bool(self._seen) and all(param.grad is None for param in self._seen)

    def end(self, *, put_all_back: bool = False) -> None:
        """Gives every parameter its own gradient back; masters keep what is stepped with.

        Args:
            put_all_back: Also those that were dropped: they were never shown.
        """
        while self._hooks:
            self._hooks.pop().remove()
        for shown in self._shown:
            shown.dropped = shown.dropped or (shown.param.grad is None and not put_all_back)
        while self._shown:
            self._put_back(self._shown[-1])
            self._shown.pop()

    def _put_back(self, shown: _Shown) -> None:
        param: Any = shown.param
        if shown.own_values is not None and shown.own is not None:
            master = self._masters.of(param)
            if master.grad is shown.own:
                master.grad = shown.own.data
            shown.own.data = shown.own_values
        param.grad = None
        if HAS_GRAD_DTYPE:
            param.grad_dtype = shown.own_dtype
        fits = shown.own is not None and (
            shown.own.dtype == param.dtype or shown.own_dtype != param.dtype
        )
        if fits and not shown.dropped:
            param.grad = shown.own
