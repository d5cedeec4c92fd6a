"""Which ranks a step has to agree with, and that they began alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from mpcore.base import are_same
from mpcore.engine.external import External
from mpcore.errors import ArgumentError, StageError
from mpcore.loss_scale import LossScale, LossScaleTensors
from mpcore.masters import Groups, Masters, name_of
from mpcore.ranks import (
    Agreement,
    ModuleJoins,
    Ranks,
    choose_agreement,
    find_replicated,
    several_ranks,
    warn_alone,
    warn_scaler,
)


class StepRanks:
    """Hands out what ranks agree by, once copies of parameters were compared.

    Args:
        ranks: What the user said.
        groups: The optimizer's param groups.
        masters: Where the masters are.
        scaling: How the loss scale moves.
        tensors: The loss scale.
    """

    def __init__(
        self,
        ranks: Ranks | None,
        groups: Groups,
        masters: Masters,
        scaling: LossScale,
        tensors: LossScaleTensors,
    ) -> None:
        self._groups = groups
        self._masters = masters
        self._ranks = ranks
        self._scaling = scaling
        self._tensors = tensors
        self._known: list[Tensor] = []  # parameters whose meshes were looked at
        self._agreement: Agreement | None = None
        self._choose()
        self._of_sums: Agreement | None = None  # of ranks that nobody told us of
        self._searched = False  # whether they were looked for, which takes a while
        self._warned = False
        self._module_joins = ModuleJoins()
        #: returns whether ranks may run out of batches: those that have then shadow the others
        self.joins: Callable[[], bool] = lambda: False
        self.has_batches = True  # whether this one is not such a shadow

    @property
    def agree(self) -> bool:
        """Whether there are others to agree with."""
        return self._agreement is not None

    def check_losses(self) -> None:
        """Raises if ranks agree: they do of one loss scale."""
        if self.agree:
            raise ArgumentError(
                "add_loss(): expected an optimizer that decides alone, got one with ranks, which "
                "agree about one loss scale. Add the losses up and call backward() once."
            )

    def of_pass(self, external: External | None) -> Agreement | None:
        """Returns what the ranks of a step agree by; collective in the first one.

        Args:
            external: The outside scaler that drives this step, if one does: it has its own ranks.

        Raises:
            StageError: On every rank, if masters that should be copies differ.
        """
        if external is not None:
            if self._ranks is not None and not self._warned:
                self._warned = True
                warn_scaler()
            return None
        several = several_ranks()
        if not several and self._agreement is None:
            return None
        if several:
            self._choose()
        if self._agreement is None and not self._warned:
            self._warned = True
            if self._of_sums is None:
                warn_alone()
        agreement = self._begun(self._agreement)
        if agreement is not None and self.joins():
            agreement.find_present(self.has_batches)
        elif self._ranks is not None:
            self._module_joins.check(self._params())
        return agreement

    def check_not_joined(self, caller: str) -> None:
        """Raises where ranks that have no batches left could not tell how often to answer."""
        if self.joins():
            raise StageError(
                f"{caller}: expected a step with one backward pass while ranks may run out of "
                "batches, got another within torch.distributed.algorithms.join.Join. Give all "
                "ranks as many batches, or leave the optimizer's Join."
            )

    @property
    def asked(self) -> int:
        """How often ranks agreed in the last step within a `Join`."""
        return 0 if self._agreement is None else self._agreement.asked

    def end_join(self) -> None:
        """Notes that no rank runs out of batches any more, and that masters may be new."""
        self.joins = lambda: False
        if self._agreement is not None:
            self._agreement.end_join()
        self.start_anew()

    def of_sums(self) -> Agreement | None:
        """Returns what makes sums of copies their mean.

        If nobody said who has copies, DistributedDataParallel knows.

        Raises:
            ArgumentError: The loss scale is one that wants the largest gradient.
        """
        if self.agree and self._scaling.wants_largest:
            raise ArgumentError(
                f"accumulate(): expected a loss scale that ranks agree about, got {self._scaling}, "
                "which wants the largest gradient of each pass. Use DynamicLossScale() with "
                "accumulate() and several ranks, or clear the gradients and leave accumulate() out."
            )
        if self._agreement is None and not self._searched and several_ranks():
            self._searched = True
            replicated = find_replicated(self._params())
            if replicated is not None:
                self._of_sums = Agreement(replicated, self._tensors)
        return self._begun(self._agreement or self._of_sums)

    def counting(self) -> Callable[[Tensor], bool]:
        """Returns what tells whether this rank counts what it holds of a parameter.

        Collective before the first step, and where an outside scaler has driven all steps so far.
        """
        agreement = self._begun(self._agreement)
        return (lambda _: True) if agreement is None else agreement.counts

    def exchange(self, value: Any, what: str, left: str) -> list[Any]:
        """Returns a value of each rank that agrees, in order; collective, syncs.

        Args:
            value: Of this rank, to be pickled.
            what: It is, for the message of an error.
            left: How all is when it fails, likewise.
        """
        if self._agreement is None:
            return [value]
        return self._agreement.exchange(value, what, left)

    def all(self, here: bool) -> bool:
        """Returns whether something is so on all ranks that agree; collective, syncs."""
        return here if self._agreement is None else self._agreement.all(here)

    def start_anew(self) -> None:
        """Notes that masters were replaced: copies are compared again."""
        for agreement in (self._agreement, self._of_sums):
            if agreement is not None:
                agreement.start_anew()

    def _choose(self) -> None:
        """Finds out who agrees, once for the parameters of now: others may have other meshes."""
        params = self._params()
        if not self._known or not are_same(params, self._known):
            self._known = params
            self._agreement = choose_agreement(self._ranks, params, self._tensors)

    def _begun(self, agreement: Agreement | None) -> Agreement | None:
        if agreement is not None:
            params = self._params()
            self._masters.create_for(param for param in params if param.requires_grad)
            name = partial(name_of, groups=self._groups)
            agreement.begin(params, name, self._masters.value_of)
        return agreement

    def _params(self) -> list[Tensor]:
        return [param for group in self._groups for param in group["params"]]
