"""What every row is given: the same weights, the same gradients, the same AdamW.

Weights and scaled gradients are numbers that FP16 and BF16 both hold exactly, so that no row
starts from rounded ones. The norm is clipped in the first two of the checked steps and in every
timed one; in the third checked step it is below the limit, so that a wrong unscale shows too (Adam
alone hardly notices a constant factor).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from mpcore.bench.shapes import ParameterList

MAX_NORM = 1.0


class AdamWOptions(TypedDict):
    """The options of AdamW that every row is given."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


ADAMW = AdamWOptions(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
#: What the scaled gradients are multiplied by in the checked steps; timed steps use the first.
FACTORS = (64.0, 256.0, 1.0)


@dataclass(frozen=True)
class Problem:
    """Weights and gradients for a parameter list.

    Attributes:
        listed: The shapes.
        device: Where all of it is.
        weights: Initial weights, bfloat16, exact in float16 as well.
        base: Scaled gradients before the factor of a step, bfloat16, exact in float16 as well.
        scale: The loss scale, a power of two.
    """

    listed: ParameterList
    device: torch.device
    weights: tuple[Tensor, ...]
    base: tuple[Tensor, ...]
    scale: float

    def fill(self, grads: Sequence[Tensor], step: int, *, scaled: bool) -> None:
        """Writes the gradients of a step, exactly, without a host sync.

        Args:
            grads: One per parameter, any floating dtype.
            step: Which factor to use.
            scaled: Whether the row unscales. If not, it is given unscaled gradients.
        """
        factor = FACTORS[step] if scaled else FACTORS[step] / self.scale
        for grad, base in zip(grads, self.base, strict=True):
            grad.copy_(base).mul_(factor)


def make_problem(listed: ParameterList, device: torch.device, seed: int = 0) -> Problem:
    """Draws weights and gradients, without a host sync.

    Args:
        listed: The shapes.
        device: Where to put them.
        seed: Of both.

    Example:
        >>> problem = make_problem(ParameterList("one", ((100,),)), torch.device("cpu"))
        >>> problem.scale, problem.base[0].dtype
        (64.0, torch.bfloat16)
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], deviation: float) -> Tensor:
        values = torch.empty(shape, device=device).normal_(0.0, deviation, generator=generator)
        # a multiple of 2^-24 keeps its exactness when it is rounded to 8 significant bits
        return values.half().bfloat16()

    return Problem(
        listed,
        device,
        tuple(draw(shape, 0.05) for shape in listed.shapes),
        tuple(draw(shape, 1.0) for shape in listed.shapes),
        # the norm is then near 8 in the first step, 32 in the second, 1/8 in the third
        2.0 ** round(math.log2(8 * math.sqrt(listed.count))),
    )


@torch.no_grad()
def oracle(problem: Problem) -> Iterator[Tensor]:
    """Yields the weights after the checked steps, computed in float64; syncs with the host.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2,
    with the coefficient of `torch.nn.utils.clip_grad_norm_`, min(1, max_norm / (norm + 1e-6)).
    """
    squares = sum(float(base.double().square().sum()) for base in problem.base)
    norm = math.sqrt(squares) / problem.scale
    beta1, beta2 = ADAMW["betas"]
    for weight, base in zip(problem.weights, problem.base, strict=True):
        w, g = weight.double(), base.double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for step, factor in enumerate(FACTORS, 1):
            clip = min(1.0, MAX_NORM / (norm * factor + 1e-6))
            x = g * (factor / problem.scale * clip)
            m = m * beta1 + x * (1 - beta1)
            v = v * beta2 + x.square() * (1 - beta2)
            w = w * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
            denominator = (v / (1 - beta2**step)).sqrt() + ADAMW["eps"]
            w = w - ADAMW["lr"] * (m / (1 - beta1**step)) / denominator
        yield w
