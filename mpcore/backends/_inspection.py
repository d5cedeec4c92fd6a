"""`inspect` of the reference backend: overflow, norms and the clip, in plain PyTorch.

The sum of squares is defined so that every device gets the same bits, whatever the order in which
it adds: beyond groups of four it adds integers. A tensor is cut into chunks of 4096 elements in the
order of memory, the last one filled up with zeros. For a chunk `x` whose largest magnitude has the
exponent `e`, clamped to [-126, 126]:

    scaled = x * 2^-e                                     exact
    four   = (s0 + s1) + (s2 + s3),  s = scaled * scaled  float32
    sum    = integer sum of trunc(four * 2^46)            the chunk's squares, in 2^(2 e - 46)

Chunks are shifted right to the largest `e` among them and added as two halves of 32 bits. So no
square of a finite number overflows. The relative error of a sum is below 3 * 2^-24 + 2^-36 +
chunks * 2^-46, that of a norm half as large.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore.backends._blocks import memory_order
from mpcore.backends._update import Plan, prepare_
from mpcore.base import SIXTEEN_BIT, GradientSet
from mpcore.errors import ArgumentError
from mpcore.updates import Hyper, sqrt64

_CHUNK = 4096
_INFINITY = 0x7F800000


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
            None from the cpu backend without statistics.
        found_inf: `[]`, int32. 1 if any element of `kinds` is not 0, else 0.
        grad_norm: `[]`, float32. Square root of the sum of all squares, NaN or infinity like them.
        coefficient: `[]`, float32. What unscales, times the clip factor.
        unscale: `[]`, float32. What unscales, without the clip.
        counts: `[len(grads), 6]`, int64. How many values, before unscaling, are NaN, +inf, -inf,
            zero, subnormal in the gradient's own format, and normal. None without statistics.
        histogram: `[len(grads), 256]`, int64. How many values, before unscaling, have the biased
            float32 exponent 0 to 255: bin 127 counts magnitudes in [1, 2), bin 0 zeros and
            subnormal float32 numbers, bin 255 infinities and NaNs. None without statistics.
    """

    kinds: Tensor
    first_bad: Tensor
    square_sum: Tensor
    largest: Tensor | None
    found_inf: Tensor
    grad_norm: Tensor
    coefficient: Tensor
    unscale: Tensor
    counts: Tensor | None = None
    histogram: Tensor | None = None


@dataclass(frozen=True)
class _Found:
    """One gradient; `sums` and `largest` (bits of float32) have an element per chunk."""

    kinds: Tensor
    first_bad: Tensor
    sums: Tensor
    largest: Tensor


@torch.no_grad()
def inspect(
    grads: Sequence[Tensor],
    coefficient: Tensor,
    max_norm: float | None,
    *,
    inverted: bool = False,
    statistics: bool = False,
    plan: Plan | None = None,
    hyper: Hyper | None = None,
) -> Inspection:
    """Finds overflow, norms and the clip of gradients that stay as they are; no host sync.

    Args:
        grads: Gradients of one device, any shape, float16 / bfloat16 / float32.
        coefficient: 0-d float32, the factor that unscales: usually 1 / loss_scale.
        inverted: Whether `coefficient` is the reciprocal of that factor.
        max_norm: Clip to this norm of the unscaled gradients, at least 0, rounded to float32;
            None: do not clip. A norm that is not finite clips nothing.
        statistics: Whether to fill `counts` and `histogram`.
        plan: A plan to prepare at the same time, see `prepare_`; None: none.
        hyper: The hyper-parameters to prepare it with.

    Raises:
        ArgumentError: `max_norm` is negative or NaN, or a gradient has another dtype.

    Example:
        >>> found = inspect([torch.tensor([6.0, 8.0]).half()], torch.tensor(0.5), 1.0)
        >>> found.found_inf.item(), found.grad_norm.item(), round(found.coefficient.item(), 4)
        (0, 5.0, 0.1)
    """
    limit = check_max_norm(max_norm)
    check_dtypes(grads)
    if plan is not None and hyper is not None:
        prepare_(plan, hyper)
    device = coefficient.device
    unscale = coefficient.reciprocal() if inverted else coefficient
    none = torch.zeros(0, dtype=torch.int64, device=device)
    flat = [memory_order(grad) for grad in grads]
    found = [_found_in(values, unscale) for values in flat]
    # the total is put together from all chunks, not from the rounded sums of tensors
    everything = _Found(
        _union([f.kinds for f in found], device),
        none,
        torch.cat([none, *(f.sums for f in found)]),
        torch.cat([none.int(), *(f.largest for f in found)]),
    )
    norm = sqrt64(_square_sum(everything))
    clip = (_float64(limit, device).float().double() / (norm + 1e-6)).clamp(max=1.0)
    clip = torch.where(everything.kinds == 0, clip, 1.0)
    return Inspection(
        kinds=_stack([f.kinds for f in found], none.int()),
        first_bad=_stack([f.first_bad for f in found], none),
        square_sum=_stack([_square_sum(f) for f in found], none.double()),
        largest=_stack([_largest(f).view(torch.float32) for f in found], none.float()),
        found_inf=(everything.kinds != 0).int(),
        grad_norm=norm.float(),
        coefficient=(unscale.double() * clip).float(),
        unscale=unscale,
        counts=count_kinds(flat, device) if statistics else None,
        histogram=_histogram(flat, device) if statistics else None,
    )


def check_max_norm(max_norm: float | None) -> float:
    """Returns the limit of the norm, infinity for none; raises if it is negative or NaN."""
    limit = float("inf") if max_norm is None else float(max_norm)
    if not limit >= 0:
        raise ArgumentError(
            f"max_norm: expected a number of at least 0 or None, got {max_norm!r}. "
            "Pass None to leave gradients as they are."
        )
    return limit


def rounded_max_norm(max_norm: float | None) -> float:
    """Returns the limit of the norm as a float32 number, whatever torch's default dtype is."""
    return ctypes.c_float(check_max_norm(max_norm)).value


def check_dtypes(grads: Sequence[Tensor]) -> None:
    """Raises unless every gradient has a dtype that can be inspected."""
    if GradientSet.of(grads).dtypes.issubset((*SIXTEEN_BIT, torch.float32)):
        return
    for index, grad in enumerate(grads):
        if grad.dtype not in (*SIXTEEN_BIT, torch.float32):
            raise ArgumentError(
                f"grads[{index}]: expected float16, bfloat16 or float32, got {grad.dtype}. "
                "Cast it first."
            )


def _stack(values: list[Tensor], nothing: Tensor) -> Tensor:
    return torch.stack(values) if values else nothing


def _found_in(values: Tensor, coefficient: Tensor) -> _Found:
    unscaled = values.float() * coefficient
    chunks = torch.nn.functional.pad(unscaled, (0, -values.numel() % _CHUNK)).view(-1, _CHUNK)
    chunks = torch.where(chunks.isfinite(), chunks, 0.0)
    largest = (chunks.view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
    scaled = chunks * ((127 - _exponent(largest)) << 23).view(torch.float32).unsqueeze(1)
    s0, s1, s2, s3 = (scaled * scaled).view(-1, _CHUNK // 4, 4).unbind(dim=2)
    sums = (((s0 + s1) + (s2 + s3)) * 2.0**46).to(torch.int64).sum(dim=1)
    return _Found(*_overflow(values, unscaled), sums, largest)


def _overflow(values: Tensor, unscaled: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the kinds of what is not finite, and where the first such value is."""
    bad = unscaled.isfinite().logical_not()
    hits = (values.isnan(), values == torch.inf, values == -torch.inf, bad & values.isfinite())
    kinds = _union([hit.any().int() << bit for bit, hit in enumerate(hits)], values.device)
    if values.numel() == 0:
        return kinds, torch.full((), -1, dtype=torch.int64, device=values.device)
    return kinds, torch.where(bad.any(), bad.int().argmax(), -1)


def _union(kinds: Sequence[Tensor], device: torch.device) -> Tensor:
    union = torch.zeros((), dtype=torch.int32, device=device)
    for some in kinds:
        union = union | some
    return union


def _largest(found: _Found) -> Tensor:
    zero = found.largest.new_zeros(1)
    return torch.cat([zero, found.largest]).amax()


def _exponent(largest: Tensor) -> Tensor:
    """Returns the exponents of magnitudes given as bits of float32."""
    return ((largest >> 23) - 127).clamp(-126, 126)


def _square_sum(found: _Found) -> Tensor:
    """Returns the sum over all chunks as 0-d float64."""
    exponent = _exponent(_largest(found))
    shift = (2 * (exponent - _exponent(found.largest))).clamp(max=63)
    aligned = found.sums >> shift
    high, low = (aligned >> 32).sum(), (aligned & 0xFFFFFFFF).sum()
    unit = ((2 * exponent - 46 + 1023).long() << 52).view(torch.float64)
    total = (high.double() * 2.0**32 + low.double()) * unit
    total = torch.where(found.kinds == 0, total, torch.inf)
    return torch.where((found.kinds & 1) == 0, total, torch.nan)


def count_kinds(flat: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns `Inspection.counts` of gradients on a device; no host sync."""
    rows = []
    for values in flat:
        magnitude, smallest = values.abs(), torch.finfo(values.dtype).tiny
        rows += [
            values.isnan().sum(),
            (values == torch.inf).sum(),
            (values == -torch.inf).sum(),
            (magnitude == 0).sum(),
            ((magnitude > 0) & (magnitude < smallest)).sum(),
            ((magnitude >= smallest) & (magnitude < torch.inf)).sum(),
        ]
    all_rows = torch.stack([_float64(0.0, device).long(), *rows])
    return all_rows.narrow(0, 1, len(rows)).view(-1, 6)


def _histogram(flat: Sequence[Tensor], device: torch.device) -> Tensor:
    counts = torch.zeros(len(flat), 256, dtype=torch.int64, device=device)
    for row, values in zip(counts, flat, strict=True):
        exponents = (values.float().view(torch.int32) >> 23) & 0xFF
        row.index_add_(0, exponents, torch.ones_like(exponents, dtype=torch.int64))
    return counts


def _float64(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)
