"""Ranks that run out of batches: what torch's `Join` asks of an optimizer.

    with Join([ddp, optimizer]):    # DistributedDataParallel first
        for batch in batches: ...

A rank that has no batch left takes part in the collectives of a step without gradients, so that its
loss scale and counters go with those of the others. In the end it takes over the state of a rank
that has trained to the last batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from mpcore.base import any_dtensor, map_tensors
from mpcore.engine.stage import Stage
from mpcore.errors import ArgumentError
from mpcore.loss_scale import LossScaleTensors
from mpcore.ranks import Ranks, latest_of


class Joins:
    """Makes an optimizer one of those that `Join` takes: it asks for names, not for a class."""

    ranks: Ranks | None
    _began: bool
    _finish: Any
    _params: Any
    _scale: LossScaleTensors
    _stage: Stage
    load_state_dict: Any
    state_dict: Any
    zero_grad: Any

    _join_config: Any = None  # which `Join` puts here

    @property
    def join_device(self) -> torch.device:
        """Where `Join` exchanges how many ranks have batches left; no host sync."""
        return self._scale.scale.device

    @property
    def join_process_group(self) -> Any:
        """The process group of `ranks`; no host sync.

        Raises:
            ArgumentError: There are no `ranks`, or not all of them hold copies of all parameters.
        """
        if self.ranks is None or self.ranks.replicas is not None or any_dtensor(self._params()):
            raise ArgumentError(
                "Join: expected an optimizer with ranks=mpcore.Ranks(), all of which hold copies, "
                f"got ranks={self.ranks} and {'' if any_dtensor(self._params()) else 'no '}"
                "DTensors. A rank without batches cannot stand in for shards, stages or experts: "
                "give all ranks as many batches."
            )
        group = self.ranks.group
        return distributed.group.WORLD if group is None else group

    def join_hook(self, divide_by_initial_world_size: bool = True) -> JoinedRank:
        """Returns what a rank without batches does, for `Join`; no host sync.

        Args:
            divide_by_initial_world_size: For DistributedDataParallel, which is told so as well.

        Raises:
            ArgumentError: As for `join_process_group`.
        """
        group = self.join_process_group
        self._stage.ranks.joins = self._is_joined
        return JoinedRank(self, group)

    def _is_joined(self) -> bool:
        config = self._join_config
        if config is None or not config.enable:
            return False
        if config.is_first_joinable:
            raise ArgumentError(
                "Join: expected DistributedDataParallel before its optimizer, whose collectives "
                "come later in a step, got the optimizer first. Write Join([ddp, optimizer])."
            )
        return True

    def _step_without_batch(self) -> None:
        """Answers the collectives of a step of the others; the loss scale moves with theirs."""
        ranks, asked = self._stage.ranks, self._stage.ranks.asked
        if self._began and not asked:
            return  # a GradScaler drives the steps, and nobody is asked here
        self.zero_grad()
        ranks.has_batches = False
        try:
            gradients = self._stage.collect("step()", None)
            for _ in range(max(asked, 1)):  # as often as in the last step with a batch
                gradients.findings.agree()
        finally:
            ranks.has_batches = True
        self._finish(gradients, moved=False)

    def _end_join(self, group: Any, *, is_last: bool) -> None:
        """Gives every rank the state of one that had batches to the end; collective, syncs."""
        source = latest_of(is_last, group)
        state = None
        if distributed.get_rank(group) == source:  # not on a device that is another's
            state = map_tensors(self.state_dict(), torch.Tensor.cpu)
        found = [state]
        distributed.broadcast_object_list(found, distributed.get_global_rank(group, source), group)
        if not is_last:
            self.load_state_dict(found[0])
        self._stage.ranks.end_join()
        self._join_config = None


class JoinedRank:
    """What a rank does once it has no batches: the hook that `Join` calls.

    Args:
        optimizer: Its optimizer.
        group: The ranks of that.
    """

    def __init__(self, optimizer: Joins, group: Any) -> None:
        self._optimizer = optimizer
        self._group = group

    def main_hook(self) -> None:
        """Shadows a step of the ranks that still have batches; collective."""
        self._optimizer._step_without_batch()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Ends it: all ranks have one state; collective, syncs.

        Args:
            is_last_joiner: Whether this rank had batches as long as any.
        """
        self._optimizer._end_join(self._group, is_last=is_last_joiner)
