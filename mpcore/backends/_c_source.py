"""C source for the compiled backend: rules written out as loops, in front of `_passes.c`.

A rule's `apply` is called once, with symbols in place of tensors. Each operation on a symbol writes
one line of C, so the code has the operations of the rule, one by one, in the rule's order:

    const float t0 = p * s2;
    const float t1 = g + t0;
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mpcore.updates import RULES, UpdateRule

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}

_HEAD = "#include <stdint.h>\n#include <string.h>\ntypedef uint16_t weight_t;\n"

_STEP = """\
LOOP void step_loop(const float *restrict grad, float *restrict master, {moment_args}
                    int64_t n, const float *s, float coefficient) {{
    const float {scalars};
    for (int64_t i = 0; i < n; i++) {{
        const float p = master[i]{old};
        const float g = (grad[i] * coefficient) * s0;
{lines}
        master[i] = {param};
{new}    }}
}}

static inline void step(const float *grad, float *master, float *const *moments, int64_t n,
                        const float *s, float coefficient) {{
    step_loop(grad, master, {passed} n, s, coefficient);
}}
"""


class Symbol:
    """A float32 value of a loop's body, or a condition: its name in C.

    Args:
        name: What C calls it.
        write: Appends a line for the value of an expression and returns its symbol.
    """

    def __init__(self, name: str, write: Callable[[str], Symbol]) -> None:
        self.name = name
        self.write = write

    def _infix(self, operator: str, other: Any, *, swapped: bool = False) -> Symbol:
        pair = (_in_c(other), self.name) if swapped else (self.name, _in_c(other))
        return self.write(f" {operator} ".join(pair))

    def __add__(self, other: Any) -> Symbol:
        return self._infix("+", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._infix("-", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._infix("*", other)

    def __truediv__(self, other: Any) -> Symbol:
        return self._infix("/", other)

    def __radd__(self, other: Any) -> Symbol:
        return self._infix("+", other, swapped=True)

    def __rsub__(self, other: Any) -> Symbol:
        return self._infix("-", other, swapped=True)

    def __rmul__(self, other: Any) -> Symbol:
        return self._infix("*", other, swapped=True)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self._infix("/", other, swapped=True)

    def __ne__(self, other: object) -> Any:
        return Symbol(f"({self.name} != {_in_c(other)})", self.write)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Symbol:
        if func not in _FUNCTIONS or kwargs:
            known = ", ".join(f"torch.{known.__name__}" for known in _FUNCTIONS)
            raise NotImplementedError(
                f"apply: expected arithmetic and {known}, got {func.__name__}. Write the rule with "
                "those, or say in `_c_source.py` what it is in C."
            )
        symbol = next(arg for arg in args if isinstance(arg, Symbol))
        return symbol.write(_FUNCTIONS[func].format(*map(_in_c, args)))


# what torch computes, NaNs included; multiplying by 1 quiets a NaN and changes nothing else
_FUNCTIONS: dict[Any, str] = {
    torch.where: "{0} ? {1} : {2}",
    torch.maximum: "({0} > {1} || {0} != {0}) ? {0} : {1}",
    torch.sign: "(float)(({0} > 0) - ({0} < 0))",
}


def _in_c(value: Any) -> str:
    if isinstance(value, Symbol):
        return value.name
    return f"(float){float(value).hex()}"


def step_source(rule: UpdateRule, moments: int) -> str:
    """Returns the function `step` of a rule: it updates `n` elements of a master and its moments.

    Args:
        rule: Whose `apply` is written out.
        moments: How many there are.

    Example:
        >>> print(step_source(RULES["sgd"], 0).split("s0;")[-1].split("}")[0])
        <BLANKLINE>
                const float t0 = p * s1;
                const float t1 = g + t0;
                const float t2 = t1 * s6;
                const float t3 = p - t2;
                master[i] = t3;
        <BLANKLINE>
    """
    lines: list[str] = []

    def write(expression: str) -> Symbol:
        symbol = Symbol(f"t{len(lines)}", write)
        lines.append(f"        const float {symbol.name} = {expression};")
        return symbol

    def root(x: Any) -> Any:
        return write(f"sqrtf({x.name})")  # IEEE: rounded to nearest

    scalars: Any = [Symbol(f"s{i}", write) for i in range(len(rule.columns))]
    old: Any = [Symbol(f"m{i}", write) for i in range(moments)]
    grad, param = (Symbol(name, write) for name in "gp")
    new_param, updated = rule.apply(grad, param, old, scalars, root)  # type: ignore[arg-type]
    return _STEP.format(
        moment_args="".join(f"float *restrict moment{i}, " for i in range(moments)),
        scalars=", ".join(f"s{i} = s[{i}]" for i in range(len(rule.columns))),
        old="".join(f", m{i} = moment{i}[i]" for i in range(moments)),
        lines="\n".join(lines),
        param=_in_c(new_param),
        new="".join(f"        moment{i}[i] = {_in_c(m)};\n" for i, m in enumerate(updated)),
        passed="".join(f"moments[{i}], " for i in range(moments)),
    )


@cache
def update_source(rule: str, moments: int, grad: torch.dtype, weight: torch.dtype | None) -> str:
    """Returns a C file that exports `update` for one combination.

    Args:
        rule: A name in `RULES`.
        moments: How many moments it has here.
        grad: float16, bfloat16 or float32.
        weight: float16, bfloat16, or None for masters that are the weights themselves.
    """
    known = RULES[rule]
    head = f"#define MOMENTS {moments}\n#define COLUMNS {len(known.columns)}\n" + _grad_type(grad)
    narrow = "narrow(from, to, n) 0" if weight is None else f"narrow narrow_{_NAMES[weight]}"
    head += f"#define {narrow}\n"
    conversions, update = _passes().split("#ifdef MOMENTS")
    return f"{head}{conversions}{step_source(known, moments)}\n#ifdef MOMENTS{update}"


@cache
def square_sums_source(grad: torch.dtype) -> str:
    """Returns a C file that exports `square_sums` for gradients of one dtype."""
    return f"#define SQUARE_SUMS\n{_grad_type(grad)}{_passes()}"


def _grad_type(grad: torch.dtype) -> str:
    if grad == torch.float32:
        return (
            f"{_HEAD}typedef float grad_t;\n"
            "#define widen(from, to, n) memcpy(to, from, (size_t)(n) * sizeof(float))\n"
        )
    return f"{_HEAD}typedef uint16_t grad_t;\n#define widen widen_{_NAMES[grad]}\n"


def _passes() -> str:
    return Path(__file__).with_name("_passes.c").read_text(encoding="utf-8")
