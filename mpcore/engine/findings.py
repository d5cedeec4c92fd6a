"""What was found in the gradients of one step: overflow, norm, and the coefficient of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mpcore.backends import Backend, Inspection, rounded_max_norm
from mpcore.base import GradientSet, ParameterSet, held_here, label
from mpcore.engine.coefficient import Coefficient
from mpcore.engine.gradient_buckets import (
    Bucket,
    Look,
    any_flag,
    buckets_of,
    largest_of,
    tensor_norms,
)
from mpcore.masters import StepPlan
from mpcore.ranks import Agreed, Agreement

#: Returns the gradients of some parameters as they are stored.
Stored = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _look_of(params: Sequence[Tensor], grads: Sequence[Tensor], found: Inspection) -> Look:
    kinds = grads.kinds if isinstance(grads, GradientSet) else None
    if kinds is not None:  # thousands of objects that need not be made again
        return Look(tuple(params), kinds.shapes, kinds.layouts, found)
    layouts = tuple((grad.dtype, grad.stride()) for grad in grads)
    return Look(tuple(params), [param.shape for param in params], layouts, found)


class Findings:
    """What looking at gradients has found so far. Nothing here syncs with the host.

    `look` reads them and finds flags and the sum of squares; `conclude` makes norm and coefficient
    of these. Of one device a backend does both at once.

    Args:
        params: Parameters that have a gradient.
        backend: Does the passes.
        coefficient: What stored gradients have to be multiplied by.
        found_before: What an outside scaler already found: 0-d, non-zero means overflow.
        finds_largest: Whether looking at them also finds `largest`.
        statistics: Whether looking at them also counts values; None: nobody watches.
        agreement: What ranks find together; None: there is one.
        scaled: Whether this rank has scaled a loss, or needs not.
    """

    def __init__(
        self,
        params: ParameterSet,
        backend: Backend,
        coefficient: Coefficient,
        *,
        found_before: Tensor | None,
        finds_largest: bool,
        statistics: bool | None,
        agreement: Agreement | None = None,
        scaled: bool = True,
    ) -> None:
        self._params = params
        self.buckets = buckets_of(params)
        self.coefficient = coefficient
        self.are_all = False  # whether flags tell everything about what is stored
        #: 0-d float64, the largest magnitude of float16 gradients, unscaled; None: nobody looked
        self.largest: Tensor | None = None
        #: what ranks have found together; None: they were not asked yet
        self.agreed: Agreed | None = None
        self._agreement = agreement
        self._is_scaled = scaled
        self._has_float64 = torch.float64 in params.dtypes
        self._backend = backend
        # what must not be forgotten besides the flags: 0-d, non-zero means overflow
        self._found_before = found_before
        self._found: Tensor | None = None
        self._finds_largest = finds_largest
        self._statistics = statistics

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants to know what the first look finds."""
        return self._statistics is not None

    def look(
        self, stored: Stored, max_norm: float | None, plan: StepPlan | None, *, scaled: bool
    ) -> Tensor:
        """Reads every gradient once: overflow, norm, coefficient; returns the norm, 0-d float32.

        Args:
            stored: Where they are.
            max_norm: Clip to this norm; None: do not clip.
            plan: The fused update that will use them, to be prepared on the way; None: none.
            scaled: Whether they are as the backward pass has left them.
        """
        self._found = None
        together = self._agreement is not None and max_norm is not None
        if len(self.buckets) == 1 and not self._has_float64 and not together:
            first = self.buckets[0].nonfinite is None
            found = self._inspection(self.buckets[0], stored, max_norm, plan)
            self.note_largest()
            self.coefficient.clip(found.coefficient)
            if first and self._found_before is None and scaled:
                self._found = found.found_inf
            self.are_all = True
            return found.grad_norm
        sums = [self._square_sum(bucket, stored, plan) for bucket in self.buckets]
        self.note_largest()
        nothing = torch.zeros_like(self.coefficient.now, dtype=torch.float64)
        total = torch.stack(sums).sum() if sums else nothing
        if together:
            agreed = self._agree(total)
            # of what is not finite nobody knows a norm
            total = torch.where(agreed.found_inf, torch.inf, agreed.square_sum)
        norm = self._conclude(total.sqrt(), max_norm if sums or together else None)
        self.are_all = True
        return norm

    def agree(self) -> None:
        """Has ranks find together whether the step overflows; collective."""
        self.note_largest()
        self._agree(torch.zeros_like(self.coefficient.now, dtype=torch.float64))

    def _agree(self, square_sum: Tensor) -> Agreed:
        if self._agreement is None:
            raise RuntimeError("there are no ranks to agree with")
        agreed = self._agreement.agree(
            self.found_inf(),
            square_sum,
            params=self._params,
            scaled=self._is_scaled,
        )
        self.agreed = agreed
        if self.largest is not None:
            self.largest = self._agreement.largest_of_ranks(self.largest)
        self.add(agreed.found_inf)
        return agreed

    def _conclude(self, total: Tensor, max_norm: float | None) -> Tensor:
        """Makes the coefficient of a norm, 0-d float64 where the scale is; returns it rounded."""
        if max_norm is not None:
            # torch.nn.utils.clip_grad_norm_ adds the same 1e-6; a norm that is not finite must not
            # reach the coefficient, or every gradient would look bad instead of the one that is
            limit = rounded_max_norm(max_norm)  # as each backend rounds it
            shrink = (limit / (total + 1e-6)).clamp(max=1.0)
            shrink = torch.where(torch.isfinite(total), shrink, torch.ones_like(shrink))
            self.coefficient.clip((self.coefficient.now.double() * shrink).float())
        return total.float()

    def _inspection(
        self, bucket: Bucket, stored: Stored, max_norm: float | None, plan: StepPlan | None
    ) -> Inspection:
        first = self.coefficient.is_first
        coefficient, inverted = self.coefficient.to_look_with(bucket.device)
        grads = stored(bucket.params)
        here = None if plan is None else plan.on(bucket.device)
        hyper = None if here is None else here.read_hyper()
        if here is not None:
            here.used()
        with label("mpcore.inspect"):
            found = self._backend.inspect(
                grads,
                coefficient,
                max_norm,
                inverted=inverted,
                statistics=bool(self._statistics) and bucket.found is None,
                plan=None if here is None else here.plan,
                hyper=hyper,
            )
        if here is not None and hyper is not None:
            here.note_prepared(hyper)
        self.coefficient.note_look(found, inverted)
        if self._statistics is not None and bucket.found is None:
            bucket.found = _look_of(bucket.params, grads, found)
        bucket.add_flags(found.kinds)
        if first:
            bucket.largest = found.largest
        return found

    def _square_sum(self, bucket: Bucket, stored: Stored, plan: StepPlan | None) -> Tensor:
        if torch.float64 not in ParameterSet.of(bucket.params).dtypes:
            squares = self._inspection(bucket, stored, None, plan).square_sum
        else:
            coefficient = self.coefficient.now.to(bucket.device, non_blocking=True)
            norms = tensor_norms(list(map(held_here, stored(bucket.params))), coefficient)
            # float64 gradients too large to be clipped: better no step than one without the clip
            bucket.add_flags(torch.isfinite(norms).logical_not().int())
            squares = norms.square()
        if self._agreement is not None:  # what several ranks hold counts once
            counted = self._agreement.counted(bucket.params, squares.device) != 0
            squares = torch.where(counted, squares, torch.zeros_like(squares))
        return squares.sum().to(self.coefficient.device, non_blocking=True)

    def found_inf(self) -> Tensor:
        """Returns 0-d int32: not 0 if any gradient, loaded or unscaled, was not finite."""
        if self._found is None:
            home = self.coefficient.device
            self._found = any_flag(self.buckets, self._found_before, home)
        return self._found

    def add(self, found_inf: Tensor) -> None:
        """Joins what somebody else has found: ranks, or an outside scaler."""
        before, home = self._found_before, self.coefficient.device
        found = (found_inf != 0).int().reshape(()).to(home, non_blocking=True)
        self._found_before = found if before is None else found | (before != 0).int().to(home)
        self._found = None

    def forget_found(self) -> None:
        """Notes that flags were added."""
        self._found = None

    def skip_largest(self) -> None:
        """Notes that each gradient was looked at by itself, before they were added up."""
        self._finds_largest = False

    def note_largest(self) -> None:
        """Finds `largest`, once and before anybody may change or drop a gradient."""
        if self._finds_largest and self.largest is None:
            self.largest = largest_of(self.buckets, self.coefficient.unscale)

    def looks(self) -> list[Look]:
        """Returns what the first look found on each device, if somebody watches."""
        return [bucket.found for bucket in self.buckets if bucket.found is not None]

    def flags(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (parameter, 0-d int32 flag) for every gradient, device by device."""
        for bucket in self.buckets:
            yield from zip(bucket.params, bucket.own_flags().unbind(), strict=True)

    def keep(self, params: set[Tensor], flag_of: Mapping[Tensor, Tensor]) -> None:
        """Forgets gradients of other parameters than these; whether one overflowed stays known."""
        self._found_before, self._found = self.found_inf(), None
        for bucket in self.buckets:
            bucket.keep(params, flag_of)
        self.buckets = [bucket for bucket in self.buckets if bucket.params]
        self._params = ParameterSet(param for param in self._params if param in params)
