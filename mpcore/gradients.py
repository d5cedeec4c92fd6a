"""The gradients of one step: unscaled once, checked, clipped by one multiply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcore._checks import SIXTEEN_BIT
from mpcore.backends import Backend
from mpcore.masters import Masters


@torch.no_grad()
def tensor_norms(grads: Sequence[Tensor], coefficient: Tensor) -> Tensor:
    """Returns the 2-norm of every `grad * coefficient`, without a host sync.

    The product is rounded to float32 as unscaling rounds it, the squares are summed in float64:
    no sum of finite float32 squares overflows there, so a norm is finite exactly if its
    gradient is. (Float64 gradients stay float64, and their squares overflow above 1e154.)

    Args:
        grads: Gradients of one device, any shape and floating dtype.
        coefficient: 0-d float32.

    Returns:
        float64 of length `len(grads)`.
    """
    wide = torch.float32
    return torch.stack(
        [
            torch.linalg.vector_norm(
                g.to(torch.promote_types(g.dtype, wide)) * coefficient, dtype=torch.float64
            )
            for g in grads
        ]
    )


@dataclass
class _Bucket:
    """The parameters of one device that have a gradient: those with a master first."""

    device: torch.device
    with_master: list[Tensor]
    without: list[Tensor]
    nonfinite: Tensor  # int32, one flag a parameter, in the order of `params`

    @property
    def params(self) -> list[Tensor]:
        return self.with_master + self.without


class StepGradients:
    """What one step does to its gradients; nothing here syncs with the host.

    `coefficient` is what the stored gradients still have to be multiplied by. At first that is
    1 / loss_scale; clipping multiplies it; `apply` multiplies it into the gradients and makes
    it 1. So unscale, clip and the cast to float32 are one multiply and one rounding.

    Args:
        params: Parameters that have a gradient; 16-bit ones have a master.
        masters: Where the masters are.
        backend: Does the passes.
        coefficient: 0-d float32, on the device that decides (that of the loss scale).
        external_found_inf: What an outside scaler already found: 0-d, non-zero means overflow.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        masters: Masters,
        backend: Backend,
        coefficient: Tensor,
        external_found_inf: Tensor | None = None,
    ) -> None:
        self.params = list(params)
        self.applied = False
        self.norm: Tensor | None = None
        self._coefficient = coefficient
        self._pending = True
        self._masters = masters
        self._backend = backend
        # what must not be forgotten besides the flags: 0-d, non-zero means overflow
        self._found_before = external_found_inf
        self._buckets = [self._bucket(device) for device in {p.device: None for p in params}]

    def _bucket(self, device: torch.device) -> _Bucket:
        here = [p for p in self.params if p.device == device]
        halves = [p for p in here if p.dtype in SIXTEEN_BIT]
        others = [p for p in here if p.dtype not in SIXTEEN_BIT]
        flags = torch.zeros(len(here), dtype=torch.int32, device=device)
        return _Bucket(device, halves, others, flags)

    def apply(self) -> None:
        """Multiplies what is pending: 16-bit gradients into masters' `.grad`, others in place."""
        if not self._pending:
            return
        for bucket in self._buckets:
            coefficient = self._coefficient.to(bucket.device, non_blocking=True)
            first, rest = bucket.nonfinite.tensor_split([len(bucket.with_master)])
            if not self.applied:
                buffers = [torch.empty_like(self._masters.of(p)) for p in bucket.with_master]
                halves = [_grad(p) for p in bucket.with_master]
                grads = [_laid_out_like(b, g) for b, g in zip(buffers, halves, strict=True)]
                for param in bucket.without:
                    _own_memory(param)
                self._backend.unscale_into(grads, buffers, coefficient, first)
                for param, buffer in zip(bucket.with_master, buffers, strict=True):
                    self._masters.of(param).grad = buffer
            else:
                self._backend.unscale_(self._grads(bucket.with_master), coefficient, first)
            self._backend.unscale_(self._grads(bucket.without), coefficient, rest)
        self.applied = True
        self._pending = False

    def clip(self, max_norm: float) -> Tensor:
        """Lowers the coefficient so that the global norm is at most `max_norm`.

        Returns:
            The 2-norm before clipping, 0-d float32; non-finite if a gradient is.
        """
        norms = []
        for bucket in self._buckets:
            coefficient = self._factor.to(bucket.device, non_blocking=True)
            grads = self._grads(bucket.params) if self.applied else list(map(_grad, bucket.params))
            per_tensor = tensor_norms(grads, coefficient)
            # float64 gradients too large to be clipped: better no step than one without the clip
            bucket.nonfinite.bitwise_or_(torch.isfinite(per_tensor).logical_not().int())
            norms.append(per_tensor.to(self._coefficient.device, non_blocking=True))
        if not norms:
            self.norm = torch.zeros_like(self._coefficient)
            return self.norm
        total = torch.linalg.vector_norm(torch.cat(norms))
        # torch.nn.utils.clip_grad_norm_ adds the same 1e-6; a norm that is not finite must not
        # reach the coefficient, or every gradient would look bad instead of the one that is
        shrink = (max_norm / (total + 1e-6)).clamp(max=1.0)
        shrink = torch.where(torch.isfinite(total), shrink, torch.ones_like(shrink))
        self._coefficient = (self._factor.double() * shrink).float()
        self._pending = True
        self.norm = total.float()
        return self.norm

    @property
    def _factor(self) -> Tensor:
        return self._coefficient if self._pending else torch.ones_like(self._coefficient)

    def found_inf(self) -> Tensor:
        """Returns 0-d int32: 1 if any gradient, loaded or unscaled, was not finite, else 0."""
        home = self._coefficient.device
        if not self.params and self._found_before is None:
            return torch.zeros((), dtype=torch.int32, device=home)
        flags = [b.nonfinite.amax().to(home, non_blocking=True) for b in self._buckets]
        if self._found_before is not None:
            flags.append((self._found_before != 0).int().reshape(()).to(home, non_blocking=True))
        return torch.stack(flags).amax() if len(flags) > 1 else flags[0]

    def final(self) -> list[Tensor]:
        """Returns the unscaled gradients, in the order of `params`, after `apply`."""
        return self._grads(self.params)

    def flags(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (parameter, 0-d int32 flag) for every gradient, in the order of `params`."""
        flag_of: dict[Tensor, Tensor] = {}
        for bucket in self._buckets:
            flag_of.update(zip(bucket.params, bucket.nonfinite.unbind(), strict=True))
        yield from ((param, flag_of[param]) for param in self.params)

    def keep(self, params: Sequence[Tensor]) -> None:
        """Leaves out parameters whose gradient the user dropped; what was found stays found.

        Args:
            params: Those that still have a gradient, in order.
        """
        if len(params) == len(self.params):
            return
        self._found_before = self.found_inf()
        kept = set(params)
        for param in self.params:
            if param not in kept:
                master = self._masters.of(param)
                master.grad = None
        flag_of = dict(self.flags())
        self.params = [param for param in self.params if param in kept]
        for bucket in self._buckets:
            bucket.with_master = [param for param in bucket.with_master if param in kept]
            bucket.without = [param for param in bucket.without if param in kept]
            flags = [flag_of[param] for param in bucket.params]
            bucket.nonfinite = torch.stack(flags) if flags else bucket.nonfinite[:0]
        self._buckets = [bucket for bucket in self._buckets if bucket.params]

    def release(self) -> None:
        """Drops the masters' gradients: a parameter without one next time must not reuse them."""
        for bucket in self._buckets:
            for param in bucket.with_master:
                self._masters.of(param).grad = None

    def _grads(self, params: Sequence[Tensor]) -> list[Tensor]:
        return [_grad(self._masters.of(param)) for param in params]


def _laid_out_like(buffer: Tensor, grad: Tensor) -> Tensor:
    """Returns `grad`, or a copy of it with the strides of `buffer`: backends want equal layouts."""
    if grad.stride() == buffer.stride():
        return grad
    return torch.empty_like(buffer, dtype=grad.dtype).copy_(grad)


def _own_memory(param: Tensor) -> None:
    """Replaces an expanded gradient, which nothing can be written to, by a copy of its own."""
    grad = _grad(param)
    shape = zip(grad.shape, grad.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in shape):
        param.grad = grad.contiguous()


def _grad(tensor: Tensor) -> Tensor:
    grad = tensor.grad
    if grad is None:  # the caller collected parameters that have one
        raise RuntimeError("a gradient vanished between the check and the step")
    return grad
