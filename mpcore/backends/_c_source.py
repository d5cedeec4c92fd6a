"""Rules written out as loops in C: `make c-steps` writes them to `_steps.h`.

A rule's `apply` is called once, with symbols in place of tensors. Each operation on a symbol writes
one line of C, so the code has the operations of the rule, one by one, in the rule's order:

    const float t0 = p * s2;
    const float t1 = g + t0;
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpcore.backends._c_command import HEADER
from mpcore.updates import RULES, UpdateRule

#: The steps of the compiled backend in the order of its table: name of a rule, number of moments.
STEPS = tuple((name, count) for name, rule in RULES.items() for count in rule.moment_counts)

_STEP = """\
LOOP void {name}_loop(const float *restrict grad, float *restrict master, {moment_args}int64_t n,
                      const float *s, float coefficient) {{
    const float {scalars};
    for (int64_t i = 0; i < n; i++) {{
        const float p = master[i]{old};
        const float g = (grad[i] * coefficient) * s0;
{lines}
        master[i] = {param};
{new}    }}
}}

static void {name}(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {{
    {name}_loop(grad, master, {passed}n, s, coefficient);
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
    """Returns a function of C that updates `n` elements of a master and its moments.

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
        name=f"{rule.name}_{moments}",
        moment_args="".join(f"float *restrict moment{i}, " for i in range(moments)),
        scalars=", ".join(f"s{i} = s[{i}]" for i in range(len(rule.columns))),
        old="".join(f", m{i} = moment{i}[i]" for i in range(moments)),
        lines="\n".join(lines),
        param=_in_c(new_param),
        new="".join(f"        moment{i}[i] = {_in_c(m)};\n" for i, m in enumerate(updated)),
        passed="".join(f"moments[{i}], " for i in range(moments)),
    )


def steps_header() -> str:
    """Returns the text of `_steps.h`: the function of every step, and tables of them."""
    functions = [step_source(RULES[name], count) for name, count in STEPS]
    columns = [len(RULES[name].columns) for name, _ in STEPS]
    tables = (
        ("step_t *const STEPS", [f"{name}_{count}" for name, count in STEPS]),
        ("const int MOMENTS", [count for _, count in STEPS]),
        ("const int COLUMNS", columns),
    )
    return "\n".join(
        [
            "/* Generated from mpcore/updates by `make c-steps`. */\n",
            *functions,
            f"#define MOST_MOMENTS {max(count for _, count in STEPS)}",
            *(f"static {kind}[] = {{{', '.join(map(str, values))}}};" for kind, values in tables),
            "",
        ]
    )


def write_header() -> None:
    """Writes `_steps.h`."""
    HEADER.write_text(steps_header(), encoding="utf-8")
