"""Fused updates: one pass over gradient, master, moments and weight, for all tensors at once.

    x = float32(grad) * coefficient       unscaled and clipped in one multiply
    p = weight where it is not rounded p  if asked for, element by element: see `adopt_`
    g = x * sign                          -1 where the optimizer maximizes
    p, moments = rule(g, p, moments)      see `mpcore_kernels.rules`
    weight = round(clamp(p))              to nearest even, as `cast_into`

All of it only if `found_inf` is 0; nothing but the second line otherwise, and step counts stay. A
step is

    plan = plan_update(...)               once
    found = inspect(grads, ..., plan=plan, hyper=hyper)
    update_(plan, grads, found.coefficient, found.found_inf, saturated, then=...)

which is three launches for one combination of dtypes: two of `inspect`, of which the second one
also prepares what depends on hyper-parameters and step counts, and one update, which also moves the
loss scale.

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1 (masters).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcore_kernels import _prepare, _update_kernel, scale
from mpcore_kernels._cache import is_capturing
from mpcore_kernels._checks import check_device, check_no_overlap, check_state
from mpcore_kernels._launch import Variant
from mpcore_kernels._scale_move import ScaleMove, numbers_of, state_of
from mpcore_kernels._table import mark_written
from mpcore_kernels._update_batch import Batch, Hyper
from mpcore_kernels._update_plan import Plan, make_plan
from mpcore_kernels.rules import RULES


def variants() -> list[Variant]:
    """Returns every variant that the functions below can use."""
    return [*_prepare.variants(), *_update_kernel.variants()]


def plan_update(rule: str, batches: Sequence[Batch]) -> Plan:
    """Describes tensors to the device for all their updates; no launch, no host sync.

    The plan keeps the tensors alive and takes their addresses as fixed. Make it on the stream on
    which the updates will run, and a new one when tensors are replaced.

    Args:
        rule: A name in `mpcore_kernels.rules.RULES`.
        batches: What is updated, all on one device, sharing no memory; one launch each. A batch has
            these attributes:
            `masters`: float32 tensors, dense in any order of dimensions.
            `weights`: their float16 or bfloat16 copies, one dtype, same shapes and strides; None
            for float32 parameters.
            `moments`: a list of float32 tensors for each moment of the rule, same shapes and
            strides.
            `steps`: `[]`, float32 each, how many updates the tensors have had; None where the rule
            needs none.
            `groups`: the param group of each tensor, from 0.

    Raises:
        TypeError: If something that should be a tensor is none.
        ValueError: If there is no such rule, a dtype, shape, layout, number or device is not one of
            the above, or tensors share memory.
        RuntimeError: If a CUDA graph is being captured.

    Example:
        >>> from types import SimpleNamespace
        >>> weight = torch.tensor([1.0, 2.0]).half()
        >>> batch = SimpleNamespace(masters=[weight.float()], weights=[weight], moments=[],
        ...                         steps=None, groups=[0])
        >>> plan = plan_update("sgd", [batch])
        >>> hyper = SimpleNamespace(numbers=((0.5, 0.0, 0.0, 0.0, 0.0, 0.0),), lrs=(None,))
        >>> prepare_(plan, hyper)
        >>> grad, found_inf = torch.tensor([8.0, 8.0]).half(), torch.tensor(0, dtype=torch.int32)
        >>> update_(plan, [[grad]], torch.tensor(0.25), found_inf, torch.tensor(0))
        >>> weight.tolist()
        [0.0, 1.0]
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}.")
    first = next((batch.masters[0] for batch in batches if len(batch.masters)), None)
    if isinstance(first, Tensor):
        check_device(_update_kernel._update_kernel, first.device)
        if is_capturing(first.device):
            raise RuntimeError(
                "plan_update: expected no capture of a CUDA graph. Make the plan before it."
            )
    return make_plan(RULES[rule], batches)


def prepare_(plan: Plan, hyper: Hyper) -> None:
    """Computes what the next update needs from step counts and hyper-parameters; no host sync.

    One small launch; `inspect` does the same in its second launch, if it is given the plan. Step
    counts are read, not advanced.

    Args:
        plan: From `plan_update`.
        hyper: Has these attributes:
            `numbers`: for each param group the numbers that the rule wants, float64, lr first.
            `lrs`: for each param group a float32 tensor of one element on the device, which
            replaces lr when the launch runs, or None.

    Raises:
        ValueError: If `hyper` does not fit the plan.
        RuntimeError: If a CUDA graph is being captured and `hyper` was not used with the plan
            before.

    Example:
        >>> from types import SimpleNamespace
        >>> param, grad = torch.tensor([1.0, 2.0]), torch.tensor([8.0, 8.0])
        >>> batch = SimpleNamespace(masters=[param], weights=None, moments=[], steps=None,
        ...                         groups=[0])
        >>> plan = plan_update("sgd", [batch])
        >>> plan.prepared
        False
        >>> # lr, momentum, dampening, weight_decay, nesterov, maximize
        >>> prepare_(plan, SimpleNamespace(numbers=((0.5, 0, 0, 0, 0, 0),), lrs=(None,)))
        >>> plan.prepared
        True
    """
    if plan.tensors:
        arguments = plan.prepare_arguments(hyper)
        _prepare.variant(plan.rule).launch(_prepare.programs(plan.tensors), arguments)
    plan.prepared = True


def update_(
    plan: Plan,
    grads: Sequence[Sequence[Tensor]],
    coefficient: Tensor,
    found_inf: Tensor,
    saturated: Tensor,
    then: ScaleMove | None = None,
    edits: Tensor | None = None,
) -> None:
    """Updates masters, moments, step counts and weights unless `found_inf` is set; no host sync.

    One launch per batch. It writes by address; autograd is told so by raising the version counters
    of all that may be written, also when `found_inf` turns out to be set: the host does not know.

    Args:
        plan: Prepared since its last update, by `prepare_` or `inspect`.
        grads: For each batch a list with a gradient for each of its masters, of the same shape and
            strides; all of a list are float32, or all of the dtype of the weights. Not written.
            They may share memory with each other, and with nothing that is written.
        coefficient: `[]`, float32. The factor that unscales and clips.
        found_inf: `[]`, int32. If not 0, nothing of the batches changes but by `edits`.
        saturated: `[]`, int64. The number of weights that were clamped is added to it.
        then: How the loss scale moves after this step, also if it is skipped; no launch of its own.
        edits: `[weights, 2]`, int64, contiguous, a row for each weight of all batches. Before it is
            updated, also if the step is skipped, a weight that somebody else wrote to becomes its
            master, element by element, and is counted as by `adopt_`; no launch of its own. None:
            weights are not read.

    Raises:
        TypeError: If an argument that should be a tensor or an integer is none.
        ValueError: If a dtype, shape, layout, number or device is not one of the above. Nothing is
            written then.
        RuntimeError: If the plan is not prepared, or a CUDA graph is being captured and the plan
            does not know the gradients. Nothing is written then.

    Example:
        >>> from types import SimpleNamespace
        >>> param, grad = torch.tensor([1.0, 2.0]), torch.tensor([8.0, 8.0])
        >>> batch = SimpleNamespace(masters=[param], weights=None, moments=[], steps=None,
        ...                         groups=[0])
        >>> plan = plan_update("sgd", [batch])
        >>> hyper = SimpleNamespace(numbers=((0.5, 0, 0, 0, 0, 0),), lrs=(None,))
        >>> for found_inf in (1, 0):  # the first step overflowed
        ...     prepare_(plan, hyper)
        ...     flag, saturated = torch.tensor(found_inf, dtype=torch.int32), torch.tensor(0)
        ...     update_(plan, [[grad]], torch.tensor(0.25), flag, saturated)
        ...     param.tolist()
        [1.0, 2.0]
        [0.0, 1.0]
    """
    check_state("coefficient", coefficient, torch.float32, ())
    device = coefficient.device
    check_device(_update_kernel._update_kernel, device)
    check_state("found_inf", found_inf, torch.int32, (), device)
    check_state("saturated", saturated, torch.int64, (), device)
    rows = _rows_of(plan, edits, device)
    state, numbers = _arguments(then, coefficient, found_inf, saturated)
    if plan.tensors and plan.device != device:
        raise ValueError(f"coefficient: expected a tensor on {plan.device}, got {device}.")
    dtypes, addresses = plan.addresses_of(grads)
    if not plan.prepared:
        raise RuntimeError(
            "update_: expected a plan that was prepared since its last update. Call prepare_, or "
            "pass the plan to inspect."
        )
    plan.prepared = False
    launches = [
        (part, dtype, table, counts)
        for part, dtype, table, counts in zip(plan.parts, dtypes, addresses, rows, strict=True)
        if part.owners.numel()
    ]
    for left, (part, dtype, table, counts) in enumerate(launches, start=1 - len(launches)):
        moves = int(then is not None and left == 0)
        variant = _update_kernel.variant(
            plan.rule, len(part.batch.moments), dtype, part.weight, adopt=counts is not None
        )
        tables = (part.rows, part.owners, table, plan.scalars[part.place])
        # what is not looked at still has to be of the right type
        scalars = (coefficient, found_inf, saturated, saturated if counts is None else counts)
        variant.launch(part.owners.numel(), (*tables, *scalars, moves, *state, *numbers))
    torch.autograd.graph.increment_version([*plan.written, saturated])
    if edits is not None:
        mark_written(edits)
    if then is not None and launches:
        mark_written(*state)
    elif then is not None:
        scale.variant().launch(1, (*state, found_inf, *numbers))


def _rows_of(plan: Plan, edits: Tensor | None, device: torch.device) -> list[Tensor | None]:
    """Returns the counters of each batch, None where nobody looks or there are no weights.

    Raises:
        TypeError, ValueError: If `edits` is not what `update_` documents.
    """
    if edits is None:
        return [None] * len(plan.parts)
    sizes = [0 if part.weight is None else len(part.batch.masters) for part in plan.parts]
    check_state("edits", edits, torch.int64, (sum(sizes), 2), device)
    parts = zip(plan.parts, edits.split(sizes), strict=True)
    return [None if part.weight is None else rows for part, rows in parts]


def _arguments(
    then: ScaleMove | None, coefficient: Tensor, found_inf: Tensor, saturated: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[float, ...]]:
    """Returns what a launch needs to move the loss scale: four tensors, nine numbers.

    Raises:
        TypeError, ValueError: If they are not what `ScaleMove` documents, or a tensor that is
            written is another argument too.
    """
    if then is None:
        # not looked at; of the right types
        stand_ins = (coefficient, found_inf, found_inf, saturated)
        return stand_ins, (0.0, 0.0, 0, 0.0, 0.0, 0, 0, 0, 0)
    state = state_of(then, coefficient.device)
    read = (coefficient, found_inf)
    check_no_overlap("then", (*state, saturated), "coefficient, found_inf", read)
    return state, numbers_of(then)
