"""Which modules of a model stay in FP32, and which cast hooks that calls for; changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.loss import _Loss
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal

from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.precision.casts import CastInputs, CastOutputs, Hooks
from mpcore.precision.norms import reads_sixteen_bits

#: Layers that divide by a statistic of their input. `_NormBase` is the base of every BatchNorm
#: (SyncBatchNorm too) and InstanceNorm.
NORMALISATIONS = (
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)

#: What 16 bits break, with what they give instead.
BROKEN = (
    _Orthogonal,  # `matrix_exp`: NaN; Householder products and solves: no 16-bit kernel
    nn.CosineSimilarity,  # its eps of 1e-8 is 0 in FP16: NaN beside a zero vector
    nn.CTCLoss,  # no 16-bit kernel
    nn.PoissonNLLLoss,  # an eps of 1e-8 again: infinite
    nn.GaussianNLLLoss,  # an eps of 1e-6: FP16 divides by it into infinity
    nn.LPPool1d,  # powers of the input: infinite from 256 on in FP16
    nn.LPPool2d,
    nn.LPPool3d,
)

Choice = str | nn.Module | type[nn.Module] | Callable[[str, nn.Module], bool]
Choices = Choice | Sequence[Choice]


@dataclass(frozen=True)
class Plan:
    """What `cast_model` is to do: modules are in the order in which the model registers them.

    Attributes:
        halves: Modules that become 16-bit.
        kept: Modules that stay in FP32, with all that is inside a kept one.
        hooks: The cast hooks that each module needs, where it needs any.
        reasons: Why each of the outermost kept modules is kept.
        chosen: Those that `keep_fp32` names, by all their names.
        named: The buffers that `keep_fp32` names.
    """

    halves: list[nn.Module]
    kept: list[nn.Module]
    hooks: dict[nn.Module, Hooks]
    reasons: dict[str, str]
    chosen: frozenset[str]
    named: frozenset[str]


def make_plan(model: nn.Module, dtype: torch.dtype, keep_fp32: Choices | None) -> Plan:
    """Returns the plan for `model`, or raises if `keep_fp32` cannot be met."""
    chosen = choose(model, keep_fp32)
    why = {module: why for module in model.modules() if (why := _why_fp32(module))}
    why |= dict.fromkeys(chosen, "named in keep_fp32")
    inside = _paths_inside(model, set(why))
    _check_sharing(model, inside)
    modules = list(model.modules())
    kept = {module for path, module in _paths(model) if inside[path]}
    halves = [module for module in modules if module not in kept]
    hooks: dict[nn.Module, Hooks] = {}
    for module in halves:
        if module is model or _owns_weights(module):
            hooks[module] = (CastInputs(dtype, _computes_itself(module)), None)
    outputs = _output_layers(model, chosen, halves)
    for module in _roots(model, inside):
        returns_fp32 = module in outputs or isinstance(module, _Loss)
        after = None if returns_fp32 else CastOutputs(dtype)
        # one that somebody named is given FP32, as every module that is named
        reads = reads_sixteen_bits(module) and module not in chosen
        hooks[module] = (None if reads else CastInputs(torch.float32), after)
    reasons = {
        path: why[module]
        for path, module in model.named_modules()
        if module in why and not (path and inside[_parent(path)])
    }
    return Plan(
        halves,
        [module for module in modules if module in kept],
        hooks,
        reasons,
        frozenset(path for path, module in _paths(model) if module in chosen),
        frozenset(_named_buffers(model, keep_fp32)),
    )


def _why_fp32(module: nn.Module) -> str:
    """Tells why a module is kept in FP32 although nobody named it; empty if it is not.

    Normalisations, tables whose forward pass writes to their weight (it would round each time), and
    what 16 bits break.
    """
    tables = (nn.Embedding, nn.EmbeddingBag)
    if isinstance(module, NORMALISATIONS):
        return "a normalisation"
    if isinstance(module, tables) and module.max_norm is not None:
        return "its forward pass writes to its weight (max_norm)"
    parts = module if isinstance(module, parametrize.ParametrizationList) else (module,)
    is_broken = any(isinstance(part, BROKEN) for part in parts)
    return "its operations are broken in 16 bits" if is_broken else ""


def _computes_itself(module: nn.Module) -> bool:
    """Tells whether no module inside has weights: one-dimensional inputs are for it, then."""
    inner = (
        child
        for name, child in module.named_children()
        if name != "parametrizations" and not isinstance(module, nn.MultiheadAttention)
    )
    return not any(_owns_weights(part) for child in inner for part in child.modules())


def choose(model: nn.Module, choices: Choices | None) -> set[nn.Module]:
    """Returns the modules that `keep_fp32` names; raises where an entry names none."""
    chosen: set[nn.Module] = set()
    for entry in _entries(choices):
        matches = {module for path, module in _paths(model) if _matches(entry, path, module)}
        # a function may well look for something that this model does not have
        names_buffer = isinstance(entry, str) and bool(_matching_buffers(model, entry))
        if not matches and not names_buffer and isinstance(entry, str | nn.Module | type):
            named = repr(entry) if isinstance(entry, str) else _class_name(entry)
            raise ArgumentError(
                f"keep_fp32: expected modules or buffers of the model, got {named}, which matches "
                "none. Names are those of model.named_modules(), with * for any part, or of "
                "model.named_buffers()."
            )
        chosen |= matches
    return chosen


def outermost(model: nn.Module, choices: Choices | None) -> list[nn.Module]:
    """Returns the modules to keep that others call, without those that they hold themselves."""
    return _roots(model, _paths_inside(model, choose(model, choices)))


def _named_buffers(model: nn.Module, choices: Choices | None) -> set[str]:
    """Returns the floating buffers that `keep_fp32` names."""
    names = (entry for entry in _entries(choices) if isinstance(entry, str))
    return {buffer for name in names for buffer in _matching_buffers(model, name)}


def _matching_buffers(model: nn.Module, pattern: str) -> list[str]:
    return [
        name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point() and fnmatch.fnmatchcase(name, pattern)
    ]


def _entries(choices: Choices | None) -> list[Choice]:
    if choices is None:
        return []
    # a Sequential is a module and a sequence, a module and a class can be called
    alone = isinstance(choices, str | nn.Module | type) or not isinstance(choices, Sequence)
    entries = cast("list[Choice]", [choices] if alone else list(cast("Sequence[Choice]", choices)))
    for entry in entries:
        if isinstance(entry, type) and not issubclass(entry, nn.Module):
            raise ArgumentTypeError(
                f"keep_fp32: expected subclasses of torch.nn.Module, got {entry.__name__}."
            )
        if not isinstance(entry, str | nn.Module) and not callable(entry):
            raise ArgumentTypeError(
                "keep_fp32: expected names, modules, module classes or a function of (name, "
                f"module), got {type(entry).__name__}."
            )
    return entries


def _matches(entry: Choice, path: str, module: nn.Module) -> bool:
    if isinstance(entry, str):
        return bool(path) and fnmatch.fnmatchcase(path, entry)
    if isinstance(entry, nn.Module):
        return module is entry
    if isinstance(entry, type):
        return isinstance(module, entry)
    return bool(entry(path, module))


def _paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields every (name, module), parents first; a shared module under each of its names."""
    yield from model.named_modules(remove_duplicate=False)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _paths_inside(model: nn.Module, chosen: set[nn.Module]) -> dict[str, bool]:
    """Tells for each name whether it lies in a chosen module (or is one)."""
    inside: dict[str, bool] = {}
    modules = dict(_paths(model))
    for path, module in modules.items():
        inherited = bool(path) and inside[_parent(path)]
        if path and module in chosen and not inherited:
            _check_parent(path, modules[_parent(path)])
        inside[path] = inherited or module in chosen
    return inside


def _check_parent(path: str, parent: nn.Module) -> None:
    if isinstance(parent, nn.MultiheadAttention):
        raise ArgumentError(
            f"keep_fp32: expected modules that their parent calls, got {path!r}, whose weights "
            f"MultiheadAttention reads by itself. Keep {_parent(path)!r} instead."
        )


def _roots(model: nn.Module, inside: dict[str, bool]) -> list[nn.Module]:
    """Returns the outermost kept modules that 16-bit modules call; none if all is kept."""
    modules = dict(_paths(model))
    # a ModuleList is never called: what a kept one holds is called from outside
    covered: dict[str, bool] = {}
    for path, module in modules.items():
        inherited = bool(path) and covered[_parent(path)]
        covered[path] = inherited or (inside[path] and type(module).forward != nn.Module.forward)
    if inside[""]:
        return []
    roots = {m: path for path, m in modules.items() if covered[path] > covered[_parent(path)]}
    for path, module in modules.items():
        if module in roots and covered[_parent(path)]:
            raise ArgumentError(
                f"keep_fp32: expected {roots[module]!r} to be called from 16-bit modules alone, "
                f"got one that a kept module calls as {path!r}. Do not share it."
            )
    return list(roots)


def _output_layers(
    model: nn.Module, chosen: set[nn.Module], halves: list[nn.Module]
) -> set[nn.Module]:
    """Returns the chosen modules after which no 16-bit weights come: the result is theirs."""
    inside = _paths_inside(model, chosen)
    named = {module for path, module in _paths(model) if inside[path]}
    modules = list(model.modules())
    weights = set(filter(_owns_weights, halves))
    last = max((n for n, module in enumerate(modules) if module in weights), default=-1)
    # a parametrization computes a weight for the module that holds it, never a result
    computes_weight = parametrize.ParametrizationList
    return {m for m in modules[last + 1 :] if m in named and not isinstance(m, computes_weight)}


def _check_sharing(model: nn.Module, inside: dict[str, bool]) -> None:
    """Raises if a tied parameter or a shared buffer would have to have two types."""
    first: dict[Tensor, str] = {}
    for path, module in _paths(model):
        for name, tensor in own_tensors(module):
            full = f"{path}.{name}".lstrip(".")
            other = first.setdefault(tensor, full)
            if inside[_parent(other)] != inside[path]:
                kept, cast = (full, other) if inside[path] else (other, full)
                raise ArgumentError(
                    f"keep_fp32: expected tied tensors to be kept or cast together, got {kept!r} "
                    f"kept and {cast!r} cast. Name the modules of both, or untie them."
                )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields a module's own parameters and buffers by name, without those of its children."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _owns_weights(module: nn.Module) -> bool:
    """Tells whether a module computes with weights of its own, parametrized ones included."""
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return any(p.is_floating_point() for p in own) or parametrize.is_parametrized(module)


def _class_name(entry: object) -> str:
    return entry.__name__ if isinstance(entry, type) else f"a {type(entry).__name__}"
