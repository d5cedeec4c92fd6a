"""What a plan is made of: batches of tensors, hyper-parameters, and what they must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from mpcore_kernels._checks import check_pairs, check_tensors
from mpcore_kernels.rules import Rule


class Batch(Protocol):
    """Tensors that one launch updates; see `plan_update`."""

    @property
    def masters(self) -> Sequence[Tensor]:
        """What is stepped."""

    @property
    def weights(self) -> Sequence[Tensor] | None:
        """Their 16-bit copies."""

    @property
    def moments(self) -> Sequence[Sequence[Tensor]]:
        """A list for each moment of the rule."""

    @property
    def steps(self) -> Sequence[Tensor] | None:
        """Step counts."""

    @property
    def groups(self) -> Sequence[int]:
        """Param group of each tensor."""


class Hyper(Protocol):
    """The hyper-parameters of all param groups; see `prepare_`."""

    @property
    def numbers(self) -> Sequence[Sequence[float]]:
        """A row for each param group."""

    @property
    def lrs(self) -> Sequence[Tensor | None]:
        """Learning rates on the device."""


def tensors_of(batch: Batch) -> list[Tensor]:
    """Returns all tensors of a batch."""
    return [*batch.masters, *(batch.weights or ()), *chain(*batch.moments), *(batch.steps or ())]


def check_batch(name: str, rule: Rule, batch: Batch, device: torch.device) -> None:
    """Raises unless a batch is what `plan_update` documents."""
    masters, moments = batch.masters, batch.moments
    if len(moments) not in rule.counts_steps:
        raise ValueError(
            f"{name}.moments: expected {' or '.join(map(str, rule.counts_steps))} lists for "
            f"{rule.name!r}, got {len(moments)}."
        )
    if batch.steps is None and rule.counts_steps[len(moments)]:
        raise ValueError(f"{name}.steps: expected a step count for each tensor, got None.")
    check_tensors(f"{name}.masters", masters, (torch.float32,), device)
    for index, moment in enumerate(moments):
        check_tensors(f"{name}.moments[{index}]", moment, (torch.float32,), device)
        check_pairs(f"{name}.masters", masters, f"{name}.moments[{index}]", moment)
    if batch.weights is not None:
        dtypes = {weight.dtype for weight in batch.weights}
        check_tensors(f"{name}.weights", batch.weights, (torch.float16, torch.bfloat16), device)
        check_pairs(f"{name}.masters", masters, f"{name}.weights", batch.weights)
        if len(dtypes) > 1:
            raise ValueError(f"{name}.weights: expected one dtype, got several. Make two batches.")
    if batch.steps is not None:
        check_tensors(f"{name}.steps", batch.steps, (torch.float32,), device)
        if len(batch.steps) != len(masters) or any(step.dim() for step in batch.steps):
            raise ValueError(f"{name}.steps: expected a 0-d tensor for each of masters.")
    if len(batch.groups) != len(masters) or any(group < 0 for group in batch.groups):
        raise ValueError(f"{name}.groups: expected the index of a param group for each of masters.")
