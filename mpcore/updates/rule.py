"""An update rule: how one optimizer computes a step, written once for all backends.

The arithmetic is one sequence of IEEE operations on float32, in the order in which it is written
here, without contraction. Whatever depends on hyper-parameters and step counts alone is computed in
float64 and rounded to float32 once: these are the *scalars* of a tensor.

    numbers(group)          what a param group says, float64, on the host
    scalars(numbers, t)     float64 -> float32, once per tensor and step, on the device
    apply(g, p, m, s)       float32, once per element

A new optimizer is one subclass of `UpdateRule` in a file of its own, listed in `mpcore.updates`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mpcore.updates.square_root import SquareRoot, sqrt32

# of most options, and none of them a tensor
_NUMBERS = (float, bool, int, type(None))


class UpdateRule(ABC):
    """How one optimizer updates.

    Attributes:
        name: What backends know the rule by.
        optimizers: Classes whose steps it computes; recognised by exact type.
        columns: Names of the scalars, in order.
        moment_counts: How many moments there may be, as options want it.
        keeps_steps: Whether the optimizer's own state has a step count.
        has_torch_kernel: Whether torch has a fused CPU kernel for it.
        never_negative: Names of moments whose elements are 0 or above: sums of squares.
    """

    name: ClassVar[str]
    optimizers: ClassVar[tuple[type, ...]]
    columns: ClassVar[tuple[str, ...]]
    moment_counts: ClassVar[tuple[int, ...]]
    keeps_steps: ClassVar[bool] = False
    has_torch_kernel: ClassVar[bool] = False
    never_negative: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the full-size tensors that the state of a parameter holds."""

    @abstractmethod
    def numbers(self, group: Mapping[str, Any], lr: float) -> tuple[float, ...]:
        """Returns the hyper-parameters of a param group, `lr` first."""

    @abstractmethod
    def scalars(self, numbers: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        """Returns the float64 values of `columns`.

        Args:
            numbers: Columns of `numbers`, float64 `[tensors]` each.
            t: float64 `[tensors]`, the step count that this update makes, from 1.
        """

    @abstractmethod
    def apply(
        self,
        grad: Tensor,
        param: Tensor,
        moments: Sequence[Tensor],
        s: Sequence[Tensor],
        sqrt: SquareRoot = sqrt32,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the updated parameter and moments, and changes nothing.

        Args:
            grad: float32, unscaled and clipped, its sign turned where the optimizer maximizes.
            param: float32, the master.
            moments: float32, in the order of `moments`.
            s: The scalars, 0-d float32 each.
            sqrt: A square root of float32 that rounds to nearest.
        """

    def first_moments(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns what each of `moments` is before the first update, in every element."""
        return (0.0,) * len(self.moments(group))

    def counts_steps(self, moments: Sequence[str]) -> bool:
        """Whether a parameter with these moments needs to know how many updates it has had."""
        return True

    def hand_over(self, state: dict[str, Any]) -> None:
        """Takes from a parameter's state what the optimizer's own step would misunderstand."""
        return  # nothing, for most

    def update_with_torch(
        self,
        numbers: Sequence[float],
        params: list[Tensor],
        grads: list[Tensor],
        moments: Sequence[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        """Updates `params` and `moments` in place with torch's fused CPU kernel.

        Only where `has_torch_kernel` says so.

        Args:
            numbers: The hyper-parameters of one param group, as `numbers` returns them.
            params: float32.
            grads: float32, unscaled; the kernel turns the sign itself.
            moments: float32, one list for each moment of the rule.
            steps: 0-d float32, the step count that this update makes; empty if none is kept.
        """
        raise NotImplementedError(f"torch has no fused kernel for {self.name}")

    def why_not(self, group: Mapping[str, Any]) -> str | None:
        """Returns which option of a param group the rule does not know, or None."""
        if group.get("foreach") is not None:
            return f"foreach={group['foreach']} asks for torch's own implementation"
        if group.get("differentiable"):
            return "differentiable=True"
        for name, value in group.items():
            if type(value) in _NUMBERS or name in ("params", "param_names"):
                continue
            if name == "lr" and isinstance(value, Tensor):
                if value.numel() != 1 or value.dtype != torch.float32:
                    return f"lr is a tensor of {value.dtype} with {value.numel()} elements"
            elif isinstance(value, Tensor) or (
                isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
            ):
                return f"{name} is a tensor"
        return None


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Returns `base ** exponent` in float64 by squaring: the same bits on every device.

    Its relative error is below `2 * exponent * 2^-53`: squaring doubles the error of its argument.

    Args:
        base: float64. What is no tensor may have a power of its own (`__torch_function__`).
        exponent: float64 whole numbers from 0 to 2^32 - 1.

    Example:
        >>> power(torch.tensor(0.5, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64))
        tensor(0.1250, dtype=torch.float64)
    """
    if has_torch_function((base, exponent)):
        return handle_torch_function(power, (base, exponent), base, exponent)
    bits = exponent.to(torch.int64)
    result = torch.ones_like(base)
    needed, same = 32, None
    if bits.device.type == "cpu" and bits.numel():  # whose tensors can be read without waiting
        highest = int(bits.max())
        # squares beyond the highest bit are never used
        needed, same = highest.bit_length(), highest if int(bits.min()) == highest else None
    for bit in range(needed):
        if same is None:
            result = torch.where((bits >> bit) & 1 != 0, result * base, result)
        elif (same >> bit) & 1:
            result = result * base
        base = base * base
    return result
