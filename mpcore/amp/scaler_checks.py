"""What a GradScaler does to an optimizer's gradients: looks at them, and unscales them in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpcore.backends import Backend, resolve
from mpcore.base import SIXTEEN_BIT, held_here, own_memory
from mpcore.masters import Groups, name_of


@dataclass
class GradCheck:
    """What was found in the gradients of one optimizer; tensors stay on their devices.

    Attributes:
        params: Those that had a gradient, per device.
        flags: Per device int32 `[params]`, not 0 where a gradient was not finite.
        flushed: Per device 0-d int64: values of 16-bit gradients that unscaling in place turned
            into 0.
        largest: Per device 0-d float64, the largest unscaled magnitude, if it was looked for.
    """

    params: dict[torch.device, list[Tensor]] = field(default_factory=dict)
    flags: dict[torch.device, Tensor] = field(default_factory=dict)
    flushed: dict[torch.device, Tensor] = field(default_factory=dict)
    largest: dict[torch.device, Tensor] = field(default_factory=dict)

    def found_inf(self, home: torch.device) -> Tensor:
        """Returns 1 if a gradient was not finite and 0 otherwise, 0-d float32; no host sync."""
        found = [flags.any().to(home, non_blocking=True) for flags in self.flags.values()]
        none = torch.zeros((), dtype=torch.bool, device=home)
        return torch.stack([none, *found]).any().float()

    def largest_gradient(self, home: torch.device) -> Tensor:
        """Returns the largest unscaled magnitude, 0 if nobody looked, 0-d float64; no host sync."""
        none = torch.zeros((), dtype=torch.float64, device=home)
        seen = [largest.to(home, non_blocking=True) for largest in self.largest.values()]
        return torch.stack([none, *seen]).amax()

    def overflowed(self, groups: Groups) -> list[str]:
        """Returns the names of the parameters whose gradient was not finite, in order; syncs."""
        bad = {
            id(param)
            for device, params in self.params.items()
            for param, flag in zip(params, self.flags[device].to("cpu").tolist(), strict=True)
            if flag
        }
        everything = (param for group in groups for param in group["params"])
        return [name_of(param, groups) for param in everything if id(param) in bad]


class GradChecker:
    """Goes over the gradients of optimizers with the backends that their devices have.

    Args:
        finds_largest: Whether to look for the largest gradient, which reads them once more.
    """

    def __init__(self, finds_largest: bool = False) -> None:
        self.finds_largest = finds_largest
        self._backends: dict[tuple[torch.device, bool], Backend] = {}

    def unscale_(self, groups: Groups, coefficient: Tensor) -> GradCheck:
        """Multiplies every gradient by `coefficient` in place and looks at both values.

        Sparse gradients are multiplied value by value; 16-bit ones are replaced by coalesced ones.
        No host sync.
        """

        def unscale(device: torch.device, grads: list[Tensor], check: GradCheck) -> Tensor:
            narrow = [grad for grad in grads if grad.dtype in SIXTEEN_BIT]
            before = _nonzero(narrow, device)
            flags = torch.zeros(len(grads), dtype=torch.int32, device=device)
            factor = coefficient.to(device, non_blocking=True)
            self._note_largest(grads, factor, check)
            self._backend(device, grads).unscale_(grads, factor, flags)
            check.flushed[device] = before - _nonzero(narrow, device)
            return flags

        return _each_device(groups, unscale)

    def look(self, groups: Groups, coefficient: Tensor) -> GradCheck:
        """Looks at every gradient and at its product with `coefficient`; changes no value.

        No host sync.
        """

        def look(device: torch.device, grads: list[Tensor], check: GradCheck) -> Tensor:
            factor = coefficient.to(device, non_blocking=True)
            self._note_largest(grads, factor, check)
            if any(grad.dtype == torch.float64 for grad in grads):  # no backend inspects those
                return torch.stack([(g * factor).isfinite().all().logical_not() for g in grads])
            return self._backend(device, grads).inspect(grads, factor, None).kinds

        return _each_device(groups, look)

    def _note_largest(self, grads: list[Tensor], factor: Tensor, check: GradCheck) -> None:
        some = [grad for grad in grads if grad.numel()]
        if self.finds_largest and some:
            norms = torch.stack([n.double() for n in torch._foreach_norm(some, torch.inf)])
            check.largest[factor.device] = norms.amax() * factor

    def backend(self, device: torch.device) -> Backend:
        """Returns the backend that moves a loss scale on a device."""
        return self._backend(device, [])

    def _backend(self, device: torch.device, grads: list[Tensor]) -> Backend:
        wide = any(grad.dtype == torch.float64 for grad in grads)
        key = (device, wide)
        if key not in self._backends:
            self._backends[key] = resolve("auto", [device], [grad.dtype for grad in grads])[1]
        return self._backends[key]


@torch.no_grad()
def _each_device(
    groups: Groups, work: Callable[[torch.device, list[Tensor], GradCheck], Tensor]
) -> GradCheck:
    """Returns what `work` finds in the gradients of each device."""
    check = GradCheck()
    values: dict[torch.device, list[Tensor]] = {}
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                grad = _values(param, param.grad)
                values.setdefault(grad.device, []).append(grad)
                check.params.setdefault(grad.device, []).append(param)
    for device, grads in values.items():
        check.flags[device] = work(device, grads, check)
    return check


def _values(param: Tensor, grad: Tensor) -> Tensor:
    """Returns the values that a gradient stores here, to be read or written."""
    if not grad.is_sparse:
        return held_here(own_memory(param, grad))
    if grad.dtype in SIXTEEN_BIT and not grad.is_coalesced():
        # values of one index are added, in 16 bits: the sum may overflow where they do not
        grad = param.grad = grad.coalesce()
    return grad._values()


def _nonzero(grads: list[Tensor], device: torch.device) -> Tensor:
    counts = [torch.count_nonzero(grad) for grad in grads]
    return torch.stack([torch.zeros((), dtype=torch.int64, device=device), *counts]).sum()
