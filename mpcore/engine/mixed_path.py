"""One step of both paths: some param groups are fused, others are stepped by their optimizer.

    inspect all  ->  unscale into some masters, inner.step() over these, round  ->  update the rest

There is one look, one coefficient and one `found_inf`, for which the general groups wait and which
the update reads on the device. General groups are first: what their optimizer raises before it has
written anything leaves the step before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcore.backends import Backend, ScaleMove
from mpcore.engine.fused_path import FusedPath
from mpcore.engine.general_path import GeneralPath
from mpcore.engine.gradients import StepGradients
from mpcore.engine.unscaled_copies import unscaled_copies
from mpcore.masters import Masters
from mpcore.updates import parts_of


class Split(NamedTuple):
    """Which parameters take which path.

    Attributes:
        fused: Fused paths, and what each of them updates of some parameters.
        general: The others of these.
        leaving: Of those, the ones of an optimizer that has a fused path.
        numbers: The param groups on the general path.
    """

    fused: list[tuple[FusedPath, Sequence[Tensor]]]
    general: Sequence[Tensor]
    leaving: list[tuple[FusedPath, Sequence[Tensor]]]
    numbers: frozenset[int]

    @property
    def only(self) -> FusedPath | None:
        """The fused path that all groups take, if it is one."""
        return self.fused[0][0] if len(self.fused) == 1 and not self.numbers else None


def split(
    params: Sequence[Tensor],
    inner: torch.optim.Optimizer,
    paths: Sequence[str],
    fused: Mapping[int, FusedPath],
) -> Split:
    """Returns which parameters take which path; in each the order is theirs.

    Args:
        params: Some of the optimizer.
        inner: The wrapped optimizer.
        paths: That of each of its param groups, "fused" or "general".
        fused: By the number of an optimizer in a chain: its fused path.
    """
    numbers = frozenset(number for number, path in enumerate(paths) if path != "fused")
    parts = [number for number, part in enumerate(parts_of(inner)) for _ in part.param_groups]
    takers = sorted({part for number, part in enumerate(parts) if number not in numbers})
    if len(takers) == 1 and not numbers:
        return Split([(fused[takers[0]], params)], [], [], numbers)
    place = {
        id(param): (part, number in numbers)
        for number, (group, part) in enumerate(zip(inner.param_groups, parts, strict=True))
        for param in group["params"]
    }
    places = [place[id(param)] for param in params]

    def those(part: int, general: bool) -> list[Tensor]:
        return [p for p, at in zip(params, places, strict=True) if at == (part, general)]

    return Split(
        fused=[(fused[part], those(part, False)) for part in takers],
        general=[param for param, (_, general) in zip(params, places, strict=True) if general],
        leaving=[(path, those(part, True)) for part, path in fused.items()],
        numbers=numbers,
    )


class MixedPath:
    """Steps some param groups on fused paths and others on the general one.

    Args:
        general: The general path.
        masters: Masters and state.
        backend: Does the passes.
    """

    def __init__(self, general: GeneralPath, masters: Masters, backend: Backend) -> None:
        self._general = general
        self._masters = masters
        self._backend = backend

    def step(self, gradients: StepGradients, split: Split, move: ScaleMove | None) -> bool:
        """Steps or skips; syncs with the host only if the wrapped optimizer needs it.

        Args:
            gradients: What to step with.
            split: Who takes which path.
            move: How the loss scale moves after the step, or None.

        Returns:
            Whether the scale has moved.
        """
        # first: it may raise, and nothing is written
        plans = [(path, path.plan(params)) for path, params in split.fused if params]
        if gradients.applied:  # shown, or sums: they are multiplied where they are
            gradients.apply()
        gradients.inspect()
        gradients.agree()
        if split.numbers:
            self._step_general(gradients, split)
        moved = False
        for place, (path, plan) in enumerate(plans, 1):
            last = place == len(plans)
            moved = path.update(plan, gradients, move if last else None)
            self._masters.note(p for p in plan.written if self._masters.of(p) is not p)
        inner: Any = self._general.inner
        inner._opt_called = True  # LR schedulers on a chain warn otherwise
        return moved

    def _step_general(self, gradients: StepGradients, split: Split) -> None:
        for path, params in split.leaving:
            path.hand_over_of(params)
        copied = [] if gradients.applied else split.general
        with unscaled_copies(gradients, copied, self._masters, self._backend):
            self._general.step_groups(split.general, gradients.found_inf(), split.numbers)
