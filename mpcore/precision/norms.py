"""Norms that read 16 bits, compute in FP32, and save their input as it came.

An FP32 norm in a 16-bit model is given its input widened, and autograd saves that: 4 bytes a value
where 2 hold all of it. These save the 16 bits, and widen them again in the backward pass. Results
and gradients keep their bits: widening is exact.

Sources: Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpcore.base import SIXTEEN_BIT


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that saves a 16-bit input as it came; no host sync.

    `cast_model` keeps it in FP32 and leaves its input alone: FP32 weights, the arithmetic of FP32,
    a result of its input's dtype, under autocast too. Where input and weights have one dtype, it is
    torch's own.

    Example:
        >>> import torch, mpcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), mpcore.LayerNorm(4))
        >>> model = mpcore.cast_model(model, torch.bfloat16)
        >>> model[1].weight.dtype, model(torch.ones(2, 4)).dtype
        (torch.float32, torch.bfloat16)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises over the last dimensions."""
        if not _is_mixed(input, self.weight):
            return super().forward(input)
        found: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
            input, list(self.normalized_shape), self.weight, self.bias, self.eps
        )[0]
        return found


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` that saves a 16-bit input as it came; no host sync.

    As `LayerNorm` does. Without `eps` it is that of FP32, in which it computes.

    Example:
        >>> import torch, mpcore
        >>> norm = mpcore.RMSNorm(4)
        >>> norm(torch.ones(2, 4).half()).dtype
        torch.float16
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises over the last dimensions."""
        if not _is_mixed(input, self.weight):
            return super().forward(input)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        found: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
            input, len(self.normalized_shape), self.weight, eps
        )
        return found


def reads_sixteen_bits(module: nn.Module) -> bool:
    """Whether a module is a norm that needs no FP32 input."""
    return isinstance(module, LayerNorm | RMSNorm)


def _is_mixed(input: Tensor, weight: Tensor | None) -> bool:
    """Whether a 16-bit input meets FP32 weights, or none: torch computes with the input's dtype."""
    return input.dtype in SIXTEEN_BIT and (weight is None or weight.dtype == torch.float32)


class _LayerNorm(torch.autograd.Function):
    """Returns the result, and of each row mean and reciprocal deviation, which are saved too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        result, mean, rstd = torch.native_layer_norm(input.float(), shape, weight, bias, eps)
        return result.to(input.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, ctx.shape, weight, bias, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(input, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *(ctx.needs_input_grad[i] for i in (2, 3))]
        given, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            grad_out=grad.float(),
            input=input.float(),
            normalized_shape=ctx.shape,
            mean=mean,
            rstd=rstd,
            weight=weight,
            bias=bias,
            output_mask=wanted,
        )
        return None if given is None else given.to(input.dtype), None, of_weight, of_bias, None


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight. Nothing is saved but input and weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, dims: int, weight: Tensor | None, eps: float) -> Tensor:
        return torch.rms_norm(input.float(), input.shape[-dims:], weight, eps).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, ctx.dims, weight, ctx.eps = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        x, g = input.float(), grad.float()
        over = tuple(range(-ctx.dims, 0))
        rstd = (x.square().mean(over, keepdim=True) + ctx.eps).rsqrt()
        normal = x * rstd
        pulled = g if weight is None else g * weight
        given = rstd * (pulled - normal * (pulled * normal).mean(over, keepdim=True))
        rows = tuple(range(x.dim() - ctx.dims))
        of_weight = (g * normal).sum(rows) if weight is not None and rows else g * normal
        return given.to(input.dtype), None, None if weight is None else of_weight, None
