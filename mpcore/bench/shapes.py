"""The parameter lists that are stepped over."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mpcore.errors import ArgumentError

Shape = tuple[int, ...]

#: Sizes that show whether the cost per parameter is flat.
SWEEP = ("1M", "10M", "50M", "100M", "200M")
_UNIT = 1_000_000


@dataclass(frozen=True)
class ParameterList:
    """The shapes of a model's parameters, under a name.

    Attributes:
        name: What tables call it.
        shapes: One per tensor.

    Example:
        >>> ParameterList("two", ((2, 3), (4,))).count
        10
    """

    name: str
    shapes: tuple[Shape, ...]

    @property
    def count(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2() -> ParameterList:
    """Returns the parameters of GPT-2 with 124 M of them; the output layer shares the embedding.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: 12 blocks
    of width 768, 50,257 tokens, 1,024 positions.

    Example:
        >>> gpt2().count, len(gpt2().shapes)
        (124439808, 148)
    """
    width = 768
    norm: tuple[Shape, ...] = ((width,), (width,))
    block: tuple[Shape, ...] = (
        *norm,
        *((width, 3 * width), (3 * width,)),
        *((width, width), (width,)),
        *norm,
        *((width, 4 * width), (4 * width,)),
        *((4 * width, width), (width,)),
    )
    return ParameterList("GPT-2 124M", ((50257, width), (1024, width), *(block * 12), *norm))


def small() -> ParameterList:
    """Returns 2,000 tensors of 4,096.

    Example:
        >>> small().count
        8192000
    """
    return ParameterList("2,000 x 4,096", ((4096,),) * 2000)


def many_small() -> tuple[ParameterList, ...]:
    """Returns lists whose steps cost what the host does about each tensor, and hardly more.

    Example:
        >>> [found.name for found in many_small()]
        ['1,000 x 64', '150 x 64 x 64', '8 x 64 x 64']
    """
    return (
        ParameterList("1,000 x 64", ((64,),) * 1000),
        ParameterList("150 x 64 x 64", ((64, 64),) * 150),
        ParameterList("8 x 64 x 64", ((64, 64),) * 8),
    )


def watched() -> tuple[ParameterList, ...]:
    """Returns lists that show what a reading of a `Monitor` costs: for rows `fused` and `read`.

    Example:
        >>> [found.name for found in watched()]
        ['2,000 x 4,096', '2,000 x 64']
    """
    return small(), ParameterList("2,000 x 64", ((64,),) * 2000)


def uniform(count: int) -> ParameterList:
    """Returns `count` parameters in tensors of 1,000 x 1,000 and one of what is left.

    Example:
        >>> uniform(2_000_100).shapes
        ((1000, 1000), (1000, 1000), (100,))
    """
    whole, rest = divmod(count, _UNIT)
    shapes: tuple[Shape, ...] = ((1000, 1000),) * whole
    if rest:
        shapes += ((rest,),)
    return ParameterList(_short(count), shapes)


def parse(text: str) -> tuple[ParameterList, ...]:
    """Returns the lists that a word of the command line names.

    Args:
        text: "gpt2", "small", "sweep" (1 M to 200 M), "host" (1,000, 150 and 8 small tensors),
            "watch" (2,000 tensors of 4,096 and of 64) or a number of parameters: 5000, 10K, 2.5M.

    Raises:
        ArgumentError: Something else.

    Example:
        >>> [found.name for found in parse("sweep")]
        ['1M', '10M', '50M', '100M', '200M']
        >>> parse("2.5M")[0].count
        2500000
    """
    if text == "gpt2":
        return (gpt2(),)
    if text == "small":
        return (small(),)
    if text == "host":
        return many_small()
    if text == "watch":
        return watched()
    if text == "sweep":
        return tuple(found for size in SWEEP for found in parse(size))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text)
    count = 0.0
    if match is not None:
        count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]
    if count < 1 or count != int(count):
        raise ArgumentError(
            "shapes: expected gpt2, small, sweep, host, watch or a number of parameters such as "
            f"10M, got {text!r}."
        )
    return (uniform(int(count)),)


def _short(count: int) -> str:
    for unit, letter in ((_UNIT, "M"), (1000, "K")):
        if count % unit == 0:
            return f"{count // unit}{letter}"
    return f"{count:,}"
