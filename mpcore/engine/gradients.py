"""The gradients of one step: looked at once, clipped by one multiply, unscaled where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mpcore.backends import Backend
from mpcore.base import (
    GradientSet,
    ParameterSet,
    are_same,
    grads_of,
    label,
    laid_out_like,
    own_memory,
)
from mpcore.engine.coefficient import Coefficient
from mpcore.engine.exposure import Exposure
from mpcore.engine.findings import Findings
from mpcore.engine.seen_gradients import SeenGradients
from mpcore.masters import Accumulated, Masters, StepPlan
from mpcore.ranks import Agreement


class StepGradients:
    """What one step does to its gradients; nothing here syncs with the host.

    `coefficient` is what the stored gradients still have to be multiplied by. At first that is
    1 / loss_scale; clipping multiplies it; `apply` multiplies it into the gradients and makes
    it 1. So unscale, clip and the cast to float32 are one multiply and one rounding.

    Args:
        params: Parameters that have a gradient; 16-bit ones have a master.
        masters: Where the masters are.
        backend: Does the passes.
        coefficient: 0-d float32, on the device that decides (that of the loss scale).
        inverted: Whether `coefficient` is the loss scale itself: see `Coefficient`.
        external_found_inf: What an outside scaler already found: 0-d, non-zero means overflow.
        plan: The fused update that will use them, to be prepared on the way; None: another path.
        finds_largest: Whether looking at them also finds `largest`.
        statistics: Whether looking at them also counts values; None: nobody watches.
        collected: The gradients that `params` have, if somebody has them already.
        agreement: What ranks find together; None: there is one.
        scaled: Whether this rank has scaled a loss, or needs not.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        masters: Masters,
        backend: Backend,
        coefficient: Tensor,
        inverted: bool = False,
        external_found_inf: Tensor | None = None,
        plan: StepPlan | None = None,
        finds_largest: bool = False,
        statistics: bool | None = None,
        collected: GradientSet | None = None,
        agreement: Agreement | None = None,
        scaled: bool = True,
    ) -> None:
        self.params = ParameterSet.of(params)
        #: what `params` have in `p.grad`, while nobody can change it
        self.collected = collected
        self.applied = False  # whether the unscaled ones are the gradients of masters
        self.torn = False  # whether an exception came while they were multiplied in place
        self.exposure: Exposure | None = None  # in `p.grad`, where users may edit them
        self.norm: Tensor | None = None
        self.plan = plan
        self.plan_is_stale = False  # whether parameters were left out since
        self.accumulated: Accumulated | None = None  # what several backward passes added up to
        self._handed_over = False  # whether masters have got gradients, maybe not all of them
        self._looked_at: SeenGradients | None = None  # by a clip that does not show them
        self._masters = masters
        self._backend = backend
        self.findings = Findings(
            self.params,
            backend,
            Coefficient(coefficient, inverted),
            found_before=external_found_inf,
            finds_largest=finds_largest,
            statistics=statistics,
            agreement=agreement,
            scaled=scaled,
        )
        self.has_ranks = agreement is not None  # others may have gradients

    def take_sums(self, accumulated: Accumulated) -> None:
        """Makes these the sums that masters hold now: unscaled, and seen to be finite or not."""
        self.accumulated = accumulated._replace(sums={})  # which are handed over
        self.findings.skip_largest()
        self.applied = self._handed_over = True
        self.findings.coefficient.spend()
        flag_of = accumulated.flags()
        for bucket in self.findings.buckets:
            # of a sum that only other ranks have there is no flag: it is looked at with the others
            none = torch.zeros((), dtype=torch.int32, device=bucket.device)
            bucket.add_flags(torch.stack([flag_of.get(param, none) for param in bucket.params]))

    def apply(self) -> None:
        """Multiplies what is pending: 16-bit gradients into masters' `.grad`, others in place."""
        if not self.findings.coefficient.pending:
            return
        if self.findings.is_watched and not self.findings.are_all and not self.applied:
            self._look(None)
        in_place = self.applied or any(bucket.without for bucket in self.findings.buckets)
        self.collected = None
        for bucket in self.findings.buckets:
            coefficient = self.coefficient.to(bucket.device, non_blocking=True)
            flags = torch.zeros_like(bucket.own_flags())
            first, rest = flags.tensor_split([len(bucket.with_master)])
            if not self.applied:
                like = map(self._masters.layout_of, bucket.with_master)
                buffers = [torch.empty_like(one, dtype=torch.float32) for one in like]
                halves = grads_of(bucket.with_master)
                grads = [laid_out_like(b, g) for b, g in zip(buffers, halves, strict=True)]
                for param, grad in zip(bucket.without, grads_of(bucket.without), strict=True):
                    grad = own_memory(param, grad)
                    if grad.stride() != param.stride():
                        param.grad = laid_out_like(param, grad)
                with label("mpcore.unscale"):
                    self._backend.unscale_into(grads, buffers, coefficient, first)
                self.torn, self._handed_over = in_place, True
                for param, buffer in zip(bucket.with_master, buffers, strict=True):
                    self._masters.of(param).grad = buffer
            else:
                self.torn = in_place
                self._backend.unscale_(self._grads(bucket.with_master), coefficient, first)
            self._backend.unscale_(self._grads(bucket.without), coefficient, rest)
            bucket.add_flags(flags)
        self.findings.note_largest()
        self.applied = self.findings.are_all = True
        self.findings.coefficient.spend()
        self.findings.forget_found()
        self.torn = False

    def expose(self, sees_pass: Callable[[Tensor], None]) -> None:
        """Shows them in `p.grad`, unscaled, in float32, to be edited there until `release`.

        Args:
            sees_pass: Called with a parameter when a backward pass comes to it.
        """
        self.exposure = Exposure(self.params, self._masters, sees_pass)

    def take_edits(self) -> None:
        """Takes what users did to `p.grad` since; values that were written are looked at again."""
        if self.exposure is not None:
            edited = self.exposure.take_edits(self.params)
        else:
            self.collected = None if self.applied else GradientSet(grads_of(self.params))
            edited = self._looked_at is not None and self._looked_at.differ_from(
                self._stored(self.params)
            )
        self.findings.are_all = self.findings.are_all and not edited

    def are_as_seen(self, every: Sequence[Tensor]) -> bool:
        """Whether a clip has seen all gradients of these parameters as they are now."""
        return self._looked_at is not None and self._looked_at.are_all_of(every)

    def conceal(self) -> None:
        """Puts the model's own gradients back into `p.grad`."""
        if self.exposure is not None:
            self.exposure.end()
            self.exposure = None

    def clip(self, max_norm: float) -> Tensor:
        """Lowers the coefficient so that the global norm is at most `max_norm`.

        Returns:
            The 2-norm before clipping, 0-d float32; non-finite if a gradient is.
        """
        self.norm = self._look(max_norm)
        if self.exposure is not None:  # who looks at them now sees them clipped
            self.apply()
            self.exposure.note(self.params)
        else:
            self._looked_at = SeenGradients(self.params, self._stored(self.params))
        return self.norm

    def inspect(self) -> None:
        """Looks for overflow, unless `clip` or `apply` already did; sums and edits may overflow."""
        if not self.findings.are_all:
            self._look(None)
            if self.exposure is not None:
                self.exposure.note(self.params)

    @property
    def counts(self) -> bool:
        """Whether an overflow of theirs counts, although no step took them.

        What ranks have not agreed on, none of them counts.
        """
        return self.was_seen and not (self.has_ranks and self.findings.agreed is None)

    def agree(self) -> None:
        """Has ranks find together whether the step overflows, once a step; collective.

        A clip has done so, but for gradients that were shown since: who knows what was written.
        """
        if self.has_ranks and (self.findings.agreed is None or self.exposure is not None):
            self.findings.agree()

    def _look(self, max_norm: float | None) -> Tensor:
        plan = None if self.plan_is_stale else self.plan
        return self.findings.look(self._stored, max_norm, plan, scaled=not self.applied)

    def _stored(self, params: Sequence[Tensor]) -> GradientSet:
        """Returns the gradients as they are: scaled ones of the model, or those `apply` made."""
        every = params is self.params or are_same(params, self.params)
        if self.collected is not None and every:
            return self.collected
        return GradientSet(self._grads(params) if self.applied else grads_of(params))

    @property
    def was_seen(self) -> bool:
        """Whether they were looked at, so that an overflow is known on the device."""
        return self.findings.are_all or self.applied or self._looked_at is not None

    @property
    def coefficient(self) -> Tensor:
        """What stored gradients still have to be multiplied by: 0-d float32."""
        return self.findings.coefficient.now

    @property
    def unscaled_by(self) -> Tensor:
        """1 / loss_scale as it was at first: 0-d float32."""
        return self.findings.coefficient.unscale

    def found_inf(self) -> Tensor:
        """Returns 0-d int32: not 0 if any gradient, loaded or unscaled, was not finite."""
        return self.findings.found_inf()

    def left_as_they_were(self) -> GradientSet | None:
        """Returns the gradients of `params` if nobody could change them since they were found."""
        return self.collected if self.plan is not None else None

    def unscaled_in_place(self) -> list[Tensor]:
        """Returns the parameters whose `p.grad` itself was multiplied."""
        buckets = self.findings.buckets if self.applied else []
        return [param for bucket in buckets for param in bucket.without]

    def final(self) -> list[Tensor]:
        """Returns the unscaled gradients, in the order of `params`, after `apply`."""
        return self._grads(self.params)

    def stored_of(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the gradients of `params` as they are, each with the strides of its master."""
        grads = self._stored(params)
        if self.applied or (grads.are_contiguous and ParameterSet.of(params).are_contiguous):
            return grads
        like = map(self._masters.layout_of, params)
        return [laid_out_like(one, grad) for one, grad in zip(like, grads, strict=True)]

    def flags(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (parameter, 0-d int32 flag) for every gradient, in the order of `params`."""
        flag_of = dict(self.findings.flags())
        yield from ((param, flag_of[param]) for param in self.params)

    def keep(self, params: Sequence[Tensor]) -> None:
        """Leaves out parameters whose gradient the user dropped; what was found stays found.

        Args:
            params: Those that still have a gradient, in order.
        """
        if len(params) == len(self.params):
            return
        self.collected = None
        self.plan_is_stale = True
        kept = set(params)
        for param in self.params:
            if param not in kept:
                self._masters.of(param).grad = None
        flag_of = dict(self.findings.flags())
        self.params = ParameterSet(param for param in self.params if param in kept)
        if self._looked_at is not None:
            self._looked_at.keep(kept)
        self.findings.keep(kept, flag_of)

    def release(self) -> None:
        """Drops the masters' gradients: a parameter without one next time must not reuse them.

        Sums are dropped for all parameters: nobody may take them for gradients of the next pass.
        """
        self.conceal()
        self._looked_at = self.collected = None  # which hold gradients
        if not self._handed_over:
            return
        for bucket in self.findings.buckets:
            for param in bucket.with_master:
                self._masters.of(param).grad = None
            if self.accumulated is not None:
                for param in bucket.without:
                    param.grad = None

    def _grads(self, params: Sequence[Tensor]) -> list[Tensor]:
        return grads_of(map(self._masters.of, params))
