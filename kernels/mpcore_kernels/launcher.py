"""The functions of this package with tables that stay on the device from call to call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpcore_kernels._cache import TableCache
from mpcore_kernels._scale_move import ScaleMove
from mpcore_kernels._update_batch import Batch, Hyper
from mpcore_kernels._update_plan import Plan
from mpcore_kernels.adopt import adopt_
from mpcore_kernels.cast import cast_into
from mpcore_kernels.inspection import Inspection, inspect
from mpcore_kernels.scale import update_scale_
from mpcore_kernels.unscale import unscale_, unscale_into
from mpcore_kernels.update import plan_update, prepare_, update_


class Launcher:
    """Launches kernels over many tensors and remembers the tables it built. One per engine.

    Each method is the function of the same name, which documents it. Called again with tensors at
    the same addresses, it skips the checks of those tensors and uploads nothing. That also makes it
    fit for a CUDA graph: call it once before the capture, with the tensors that the graph will use,
    and keep the launcher for as long as the graph.

    Args:
        capacity: How many tables to keep, those of CUDA graphs not counted.

    Example:
        >>> import torch
        >>> launcher = Launcher()
        >>> grad, flags = torch.tensor([2.0]), torch.zeros(1, dtype=torch.int32)
        >>> for _ in range(3):
        ...     launcher.unscale_([grad], torch.tensor(0.5), flags)
        >>> grad.item()
        0.25
    """

    #: Whether `inspect` saves a launch where it prepares the plan of the update to come.
    prepares_on_the_way = True

    def __init__(self, capacity: int = 32) -> None:
        self._tables = TableCache(capacity)

    def unscale_(self, grads: Sequence[Tensor], coefficient: Tensor, nonfinite: Tensor) -> None:
        """See `mpcore_kernels.unscale_`; no host sync."""
        unscale_(grads, coefficient, nonfinite, tables=self._tables)

    def unscale_into(
        self,
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        coefficient: Tensor,
        nonfinite: Tensor,
    ) -> None:
        """See `mpcore_kernels.unscale_into`; no host sync."""
        unscale_into(grads, outs, coefficient, nonfinite, tables=self._tables)

    def cast_into(
        self,
        masters: Sequence[Tensor],
        weights: Sequence[Tensor],
        found_inf: Tensor,
        saturated: Tensor,
    ) -> None:
        """See `mpcore_kernels.cast_into`; no host sync."""
        cast_into(masters, weights, found_inf, saturated, tables=self._tables)

    def adopt_(self, weights: Sequence[Tensor], masters: Sequence[Tensor], counts: Tensor) -> None:
        """See `mpcore_kernels.adopt_`; no host sync."""
        adopt_(weights, masters, counts, tables=self._tables)

    def inspect(
        self,
        grads: Sequence[Tensor],
        coefficient: Tensor,
        max_norm: float | None,
        *,
        inverted: bool = False,
        statistics: bool = False,
        plan: Plan | None = None,
        hyper: Hyper | None = None,
    ) -> Inspection:
        """See `mpcore_kernels.inspect`; no host sync."""
        return inspect(
            grads,
            coefficient,
            max_norm,
            inverted=inverted,
            statistics=statistics,
            plan=plan,
            hyper=hyper,
            tables=self._tables,
        )

    def plan_update(self, rule: str, batches: Sequence[Batch]) -> Plan:
        """See `mpcore_kernels.plan_update`; no launch, no host sync."""
        return plan_update(rule, batches)

    def prepare_(self, plan: Plan, hyper: Hyper) -> None:
        """See `mpcore_kernels.prepare_`; no host sync."""
        prepare_(plan, hyper)

    def update_(
        self,
        plan: Plan,
        grads: Sequence[Sequence[Tensor]],
        coefficient: Tensor,
        found_inf: Tensor,
        saturated: Tensor,
        then: ScaleMove | None = None,
        edits: Tensor | None = None,
    ) -> None:
        """See `mpcore_kernels.update_`; no host sync."""
        update_(plan, grads, coefficient, found_inf, saturated, then=then, edits=edits)

    def update_scale_(self, move: ScaleMove, found_inf: Tensor) -> None:
        """See `mpcore_kernels.update_scale_`; no host sync."""
        update_scale_(move, found_inf)
