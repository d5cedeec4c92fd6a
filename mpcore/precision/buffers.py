"""Which buffers of 16-bit modules stay in FP32, and what rounding does to the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from mpcore.base import SIXTEEN_BIT
from mpcore.errors import ArgumentError
from mpcore.precision.lender import Kind, lend, lender_of
from mpcore.precision.weak import RunningTensor, WeakTensor, bounded

#: Names (the last part, with wildcards) of one-dimensional codes of positions, distances, times and
#: noise: what is computed from them, an angle say, needs digits that 16 bits have not.
POSITION_CODES = (
    "*inv_freq*",
    "freq*",
    "*_freqs",
    "*freq_bands",
    "*timescale*",
    "*slopes",
    "*div_term",
    "*sigmas",
    "*timesteps",
    "betas",
    "alphas*",
)
#: Modules that write their own buffers, by class, and by name where importing would cost seconds.
WRITERS: tuple[type[nn.Module], ...] = (_SpectralNorm,)
WRITERS_ELSEWHERE = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")
#: Why a buffer stays in FP32 that a pass was seen to write.
WRITTEN = "written by the forward pass"
#: One warning names the buffers of which rounding changes a value by more than this,
ABSOLUTE_BOUND = 0.01
#: or by more than this share of their largest one.
RELATIVE_BOUND = 2.0**-8


@dataclass(frozen=True)
class BufferChoice:
    """What becomes of a floating buffer of a 16-bit module.

    Attributes:
        name: As in `model.named_buffers()`; of a shared one the first.
        kind: As what the module sees it if it stays in FP32; None if it is cast.
        reason: Why.
        error: The largest difference that rounding makes; 0 if it is not rounded. What lies below
            -65504 is a mask, and not counted.
        largest: Its largest magnitude.
        is_dense: Whether it may stay in FP32: what gives way has to be dense.
    """

    name: str
    kind: Kind | None
    reason: str
    error: float = 0.0
    largest: float = 0.0
    is_dense: bool = True

    def kept(self, kind: Kind, reason: str) -> BufferChoice:
        """Returns the choice to keep it in FP32."""
        return replace(self, kind=kind, reason=reason, error=0.0)

    @property
    def is_grave(self) -> bool:
        """Whether rounding it is worth a warning."""
        return self.error > ABSOLUTE_BOUND or self.error > RELATIVE_BOUND * self.largest


Choices = dict[str, BufferChoice]


def choose_buffers(
    model: nn.Module, halves: Iterable[nn.Module], dtype: torch.dtype, named: frozenset[str]
) -> Choices:
    """Returns what becomes of every floating buffer of some modules, by name; changes nothing.

    Args:
        model: What the names are of.
        halves: Those of its modules that become 16-bit.
        dtype: What they are cast to.
        named: Buffers to keep in FP32.

    Raises:
        ArgumentError: One of them is sparse.
    """
    casts = set(halves)
    choices: Choices = {}
    first: dict[Tensor, str] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        for leaf, buffer in owner._buffers.items():
            name = f"{path}.{leaf}".lstrip(".")
            if owner not in casts or buffer is None or not buffer.is_floating_point():
                continue
            known = first.setdefault(buffer, name)
            if known == name:
                choices[name] = _choose(owner, leaf, name, buffer, dtype)
            if name in named and not choices[known].is_dense:
                raise ArgumentError(
                    f"keep_fp32: expected dense buffers, got {name!r}, which is sparse. Keep the "
                    "module that has it."
                )
            if name in named and choices[known].kind is None:
                choices[known] = choices[known].kept(RunningTensor, "named in keep_fp32")
    return choices


def _choose(
    owner: nn.Module, leaf: str, name: str, buffer: Tensor, dtype: torch.dtype
) -> BufferChoice:
    lender = lender_of(owner)
    if lender is not None and leaf in lender.kinds:
        return BufferChoice(name, lender.kinds[leaf], "kept when a part was cast")
    if buffer.numel() == 1 and buffer.layout == torch.strided:
        return BufferChoice(name, RunningTensor, "a single number")
    if _writes(owner, leaf):
        return BufferChoice(name, RunningTensor, "written by its module")
    if buffer.dtype in SIXTEEN_BIT:
        return BufferChoice(name, None, "16-bit before")
    if buffer.layout != torch.strided:
        error, largest = _rounding_error(_values(buffer), dtype)
        return BufferChoice(name, None, "sparse", error, largest, is_dense=False)
    is_line = buffer.numel() == max(buffer.shape, default=0)
    if is_line and any(fnmatch.fnmatchcase(leaf, pattern) for pattern in POSITION_CODES):
        return BufferChoice(name, WeakTensor, "a position code by its name")
    error, largest = _rounding_error(buffer, dtype)
    if error == 0:
        return BufferChoice(name, None, "exact", 0.0, largest)
    if is_line and _is_progression(buffer):
        return BufferChoice(name, WeakTensor, "a position code by its values")
    return BufferChoice(name, None, "rounded", error, largest)


def _values(sparse: Tensor) -> Tensor:
    return sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()


def _writes(owner: nn.Module, leaf: str) -> bool:
    """Tells whether a module is known to write one of its own buffers in each pass."""
    if isinstance(owner, WRITERS) or type(owner).__module__ in WRITERS_ELSEWHERE:
        return True
    hooks = [h for h in owner._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
    return any(leaf in (f"{hook.name}_u", f"{hook.name}_v") for hook in hooks)


def _rounding_error(buffer: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the largest difference that a cast makes to a value, and the largest magnitude."""
    if not buffer.numel():
        return 0.0, 0.0
    wide = buffer.detach().double()
    counts = wide.isfinite() & (wide >= torch.finfo(torch.float16).min)
    difference = (bounded(buffer.detach(), dtype).to(dtype).double() - wide).abs()
    zero = torch.zeros((), dtype=wide.dtype, device=wide.device)
    error = torch.where(counts, difference, zero).amax()
    return float(error), float(torch.where(counts, wide.abs(), zero).amax())


def _is_progression(buffer: Tensor) -> bool:
    """Tells whether values rise or fall from one end to the other, of one sign, by a factor of 16.

    Frequencies, slopes, time scales and noise levels do, whatever their name; also twice in a row,
    as rotary codes have it.
    """
    values = buffer.detach().flatten().double()
    first, second = values.tensor_split(2)
    if torch.equal(first, second):
        values = first
    values = -values if bool((values < 0).all()) else values
    if values.numel() < 4 or not bool((values > 0).all()):
        return False
    steps = values.diff()
    is_monotone = bool((steps >= 0).all()) or bool((steps <= 0).all())
    ends = float(values[0] / values[-1])
    return is_monotone and max(ends, 1 / ends) >= 16


def settle_buffers(
    model: nn.Module, dtype: torch.dtype, choices: Mapping[str, BufferChoice]
) -> None:
    """Casts, widens and lends buffers as was chosen, in place, so that shared ones stay shared."""
    kinds: dict[Tensor, Kind | None] = {}
    sparse: dict[Tensor, Tensor] = {}
    for name, choice in choices.items():
        owner, leaf = owner_of(model, name)
        buffer = owner._buffers[leaf]
        if buffer is None:
            continue
        kinds[buffer] = choice.kind
        if buffer.layout != torch.strided:
            sparse[buffer] = buffer.to(dtype)  # whose data cannot be put under another
        elif choice.kind is None and buffer.dtype not in SIXTEEN_BIT:
            buffer.data = bounded(buffer.data, dtype).to(dtype)
        elif choice.kind is not None and buffer.dtype in SIXTEEN_BIT:
            buffer.data = buffer.data.float()
    for module in model.modules():
        module._buffers |= {n: sparse[b] for n, b in module._buffers.items() if b in sparse}
        owned = {leaf: b for leaf, b in module._buffers.items() if b is not None and b in kinds}
        if owned:
            found = {leaf: kind for leaf, b in owned.items() if (kind := kinds[b]) is not None}
            lend(module, found)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that has a buffer, and the buffer's name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def warning_of(choices: Iterable[BufferChoice], dtype: torch.dtype) -> str:
    """Returns what to say of the buffers whose rounding is grave; empty if there are none."""
    grave = [choice for choice in choices if choice.is_grave]
    if not grave:
        return ""
    listed = ", ".join(f"{c.name} by up to {c.error:.3g} (of {c.largest:.3g})" for c in grave)
    short = str(dtype).removeprefix("torch.")
    return (
        f"cast_model: rounds buffers to {short}: {listed}. If what is computed from them needs "
        f"their digits, keep them: keep_fp32={[c.name for c in grave]}, beside what is kept now."
    )
