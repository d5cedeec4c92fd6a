"""Read every gradient once: is it finite, how large is it, and by what must it be multiplied.

    x           = float32(grad) * coefficient               the unscaled gradient, never stored
    square_sum  = sum of x^2                                of each tensor
    grad_norm   = sqrt(sum of all square_sum)
    found_inf   = any x infinite or NaN
    latched     = coefficient * min(1, max_norm / (grad_norm + 1e-6))

`latched` unscales and clips in one multiply; the 1e-6 is that of `torch.nn.utils.clip_grad_norm_`.

Two launches follow each other: one over chunks (one per dtype among the gradients), which writes
what it found to a buffer, and one that puts the chunks of each tensor and of all together.

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2; Pascanu et al.,
"On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1 (clipping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore_kernels import _chunks, _finish, _prepare
from mpcore_kernels._cache import TableCache, cached
from mpcore_kernels._checks import check_device, check_state, check_tensors
from mpcore_kernels._dtypes import FORMATS
from mpcore_kernels._launch import Variant
from mpcore_kernels._statistics import CATEGORIES, EXPONENTS
from mpcore_kernels._table import CHUNK, Table, build, upload
from mpcore_kernels._update_batch import Hyper
from mpcore_kernels._update_plan import Plan


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; tensors on the device of the gradients.

    Attributes:
        kinds: `[len(grads)]`, int32. A set of bits: 1 for NaN, 2 for +inf, 4 for -inf, 8 for a
            finite value whose product with the coefficient is not finite. 0: all is finite.
        first_bad: `[len(grads)]`, int64. Place of the first value that set a bit of `kinds`,
            counted in the order of memory; -1 if there is none.
        square_sum: `[len(grads)]`, float64. Sum of squares of unscaled values; NaN if the gradient
            holds a NaN, infinity if something else in `kinds` is set.
        largest: `[len(grads)]`, float32. Largest magnitude among finite unscaled values, or 0.
        found_inf: `[]`, int32. 1 if any element of `kinds` is not 0, else 0.
        grad_norm: `[]`, float32. Square root of the sum of all squares, NaN or infinity like them.
        coefficient: `[]`, float32. What unscales, times the clip factor.
        unscale: `[]`, float32. What unscales, without the clip.
        counts: `[len(grads), 6]`, int64. How many values, before unscaling, are NaN, +inf, -inf,
            zero, subnormal in the gradient's own format, and normal. None without statistics.
        histogram: `[len(grads), 256]`, int64. How many values, before unscaling, have the biased
            float32 exponent 0 to 255: bin 127 counts magnitudes in [1, 2), bin 0 zeros and
            subnormal float32 numbers, bin 255 infinities and NaNs. None without statistics.

    Example:
        >>> import torch
        >>> found = inspect([torch.tensor([3.0, 4.0])], torch.tensor(1.0), None)
        >>> found.grad_norm.item(), found.largest.tolist(), found.found_inf.item()
        (5.0, [4.0], 0)
    """

    kinds: Tensor
    first_bad: Tensor
    square_sum: Tensor
    largest: Tensor
    found_inf: Tensor
    grad_norm: Tensor
    coefficient: Tensor
    unscale: Tensor
    counts: Tensor | None = None
    histogram: Tensor | None = None


@dataclass(frozen=True)
class _Plan:
    """Tables of gradients, and where the chunks of each gradient are: first one and number."""

    tables: list[Table]
    segments: Tensor

    @property
    def chunks(self) -> int:
        return sum(table.programs for table in self.tables)


def variants() -> list[Variant]:
    """Returns every variant that `inspect` can use."""
    chunks = [
        _chunks.variant(dtype, statistics) for statistics in (False, True) for dtype in FORMATS
    ]
    return [*chunks, _finish.variant()]


def _plan(grads: Sequence[Tensor], device: torch.device) -> _Plan:
    """Describes `grads` on their device, without a host sync."""
    tables = build(grads, grads)
    segments = [(0, 0)] * len(grads)
    first = 0
    for table in tables:
        for index, grad in enumerate(grads):
            if grad.dtype == table.source and grad.numel() != 0:
                segments[index] = (first, -(-grad.numel() // CHUNK))
                first += segments[index][1]
    host = torch.tensor(segments, dtype=torch.int64, device="cpu").view(-1, 2)
    return _Plan(tables, upload(host, device))


def _launch(
    plan: _Plan,
    result: Inspection,
    given: tuple[Tensor, int],
    max_norm: float,
    counters: Tensor,
    update: tuple[Plan, Hyper] | None,
) -> None:
    """Queues the launches that fill `result` and prepare `update`.

    `given` is the coefficient before the clip, and whether it is inverted.
    """
    # may raise, so it comes before the first launch
    prepare = None if update is None else update[0].prepare_arguments(update[1])
    chunks, base = plan.chunks, 0
    sums = torch.empty(chunks, dtype=torch.int64, device=result.kinds.device)
    facts = torch.empty(3, chunks, dtype=torch.int32, device=result.kinds.device)
    statistics = result.counts is not None
    for table in plan.tables:
        _chunks.variant(table.source, statistics).launch(
            table.programs,
            (table.entries, table.owners, *given, sums, facts, chunks, base, counters),
        )
        base += table.programs
    segments = result.kinds.numel()
    arguments = (
        *(plan.segments, sums, facts, chunks, *given, max_norm),
        *(result.kinds, result.first_bad, result.square_sum, result.largest),
        *(result.found_inf, result.grad_norm, result.unscale, result.coefficient),
    )
    if update is None or prepare is None:
        _finish.variant().launch(1 + segments, arguments)
        return
    programs = 1 + segments + _prepare.programs(update[0].tensors)
    rule = update[0].rule
    _prepare.finishing_variant(rule).launch(programs, (*arguments, segments, *prepare))


def inspect(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    max_norm: float | None,
    *,
    inverted: bool = False,
    statistics: bool = False,
    plan: Plan | None = None,
    hyper: Hyper | None = None,
    tables: TableCache | None = None,
) -> Inspection:
    """Reads every gradient once and finds overflow, norms and the clip, without a host sync.

    One launch per dtype among `grads` and one more, whatever their number. Nothing that is passed
    is written, but a plan is prepared for its next update, in that last launch.

    Args:
        grads: Gradients of one device, any shape, float16, bfloat16 or float32 in any mixture,
            dense in any order of dimensions. May be empty.
        coefficient: `[]`, float32. The factor that unscales, `1 / loss_scale`.
        inverted: Whether `coefficient` is the reciprocal of that factor: the loss scale itself.
        max_norm: Clip to this norm of the unscaled gradients, at least 0, rounded to float32;
            None: do not clip. A norm that is not finite clips nothing.
        statistics: Whether to fill `counts` and `histogram`.
        plan: What to prepare, as `prepare_` does; None: nothing.
        hyper: What to prepare it for, see `prepare_`.
        tables: Where to keep what describes `grads` to the device; None: nowhere.

    Returns:
        New tensors on the device; reading one waits for the device.

    Raises:
        TypeError: If an argument that should be a tensor is none.
        ValueError: If a dtype, layout or device is not one of the above, the device cannot run the
            kernels, `max_norm` is negative or NaN, or `plan` and `hyper` do not fit.
        RuntimeError: If a CUDA graph is being captured and `tables` does not know `grads`.

    Example:
        >>> grads = [torch.tensor([6.0, 8.0]).half(), torch.tensor([1.0, float("nan")])]
        >>> first = inspect(grads[:1], torch.tensor(0.5), 1.0)
        >>> first.found_inf.item(), first.grad_norm.item(), round(first.coefficient.item(), 4)
        (0, 5.0, 0.1)
        >>> both = inspect(grads, torch.tensor(0.5), 1.0)
        >>> both.kinds.tolist(), both.first_bad.tolist(), both.coefficient.item()
        ([0, 1], [-1, 1], 0.5)
    """
    check_state("coefficient", coefficient, torch.float32, ())
    device = coefficient.device
    check_device(_chunks.variant(torch.float32, statistics).kernel, device)
    limit = float("inf") if max_norm is None else float(max_norm)
    if not limit >= 0:
        raise ValueError(
            f"max_norm: expected a number of at least 0 or None, got {max_norm!r}. "
            "Pass None to leave gradients as they are."
        )

    update = _check_update(plan, hyper, device)

    def make() -> _Plan:
        check_tensors("grads", grads, tuple(FORMATS), device)
        return _plan(grads, device)

    tables_of_grads = cached(tables, "inspect", [grads], device, make)
    size = len(grads)
    counters = torch.zeros(
        size if statistics else 0, CATEGORIES + EXPONENTS, dtype=torch.int64, device=device
    )
    result = Inspection(
        kinds=torch.empty(size, dtype=torch.int32, device=device),
        first_bad=torch.empty(size, dtype=torch.int64, device=device),
        square_sum=torch.empty(size, dtype=torch.float64, device=device),
        largest=torch.empty(size, dtype=torch.float32, device=device),
        found_inf=torch.empty((), dtype=torch.int32, device=device),
        grad_norm=torch.empty((), dtype=torch.float32, device=device),
        coefficient=torch.empty((), dtype=torch.float32, device=device),
        unscale=torch.empty((), dtype=torch.float32, device=device),
        counts=counters[:, :CATEGORIES] if statistics else None,
        histogram=counters[:, CATEGORIES:] if statistics else None,
    )
    _launch(tables_of_grads, result, (coefficient, int(inverted)), limit, counters, update)
    if plan is not None:
        plan.prepared = True
    return result


def _check_update(
    plan: Plan | None, hyper: Hyper | None, device: torch.device
) -> tuple[Plan, Hyper] | None:
    """Returns what to prepare, None if there is nothing; raises unless both are given."""
    if (plan is None) != (hyper is None):
        raise ValueError("plan, hyper: expected both or none of them, got one.")
    if plan is None or hyper is None or not plan.tensors:
        return None
    if plan.device != device:
        raise ValueError(f"plan: expected one of tensors on {device}, got {plan.device}.")
    return plan, hyper
