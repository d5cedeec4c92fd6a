"""Rules written out in C: `make c-steps` writes them to `_steps.h`.

A rule's `apply` and `scalars` are called once, with symbols in place of tensors. Each operation on
a symbol writes one line of C, so the code has the operations of the rule, one by one, in the rule's
order:

    const float t0 = p * s[2];
    const float t1 = g + t0;

What surrounds them is in `_loop.h`; a loop is named here for each rule and format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpcore.backends._c_command import HEADER
from mpcore.updates import RULES, UpdateRule, power, sqrt64

#: The steps of the compiled backend in the order of its table: name of a rule, number of moments.
STEPS = tuple((name, count) for name, rule in RULES.items() for count in rule.moment_counts)

_RULE = """\
INLINE float {name}(float unscaled, float p, float *m, const float *s) {{
{old}    const float g = unscaled * s[0];
{lines}
{new}    return {param};
}}
"""

_LOOP = """\
LOOP uint32_t {rule}_{format}(ELEMENTS) {{
    return update_lanes({rule}, {moments}, {columns}, {grad}, {weight}, PASSED_ON);
}}
"""

# what C calls the formats of `_loop.h`, in their order: dtypes of gradients and weights
_FORMATS = {
    "float32": ("FLOAT32", "FLOAT32"),
    "float16": ("FLOAT16", "FLOAT16"),
    "bfloat16": ("BFLOAT16", "BFLOAT16"),
    "to_float16": ("FLOAT32", "FLOAT16"),
    "to_bfloat16": ("FLOAT32", "BFLOAT16"),
}

_SCALARS = """\
static void {name}_scalars(const double *n, double t, float *s) {{
    const double {numbers};
{lines}
{stores}}}
"""


class Body:
    """The lines of C in which symbols are computed.

    Args:
        kind: What C calls the type of all values: float or double.
        indent: Before each line.
    """

    def __init__(self, kind: str, indent: str) -> None:
        self.kind = kind
        self.lines: list[str] = []
        self._indent = indent

    def symbol(self, name: str) -> Symbol:
        """Returns the symbol of what C calls so."""
        return Symbol(name, self)

    def write(self, expression: str) -> Symbol:
        """Appends a line for the value of an expression and returns its symbol."""
        symbol = self.symbol(f"t{len(self.lines)}")
        self.lines.append(f"{self._indent}const {self.kind} {symbol.name} = {expression};")
        return symbol

    def in_c(self, value: Any) -> str:
        """Returns a symbol or a number as C has it."""
        if isinstance(value, Symbol):
            return value.name
        return f"({self.kind}){float(value).hex()}"


class Symbol:
    """A value of a body, or a condition: its name in C.

    Args:
        name: What C calls it.
        body: Where values that follow from it are computed.
    """

    def __init__(self, name: str, body: Body) -> None:
        self.name = name
        self.body = body

    def _infix(self, operator: str, other: Any, *, swapped: bool = False) -> Symbol:
        pair = [self.name, self.body.in_c(other)]
        return self.body.write(f" {operator} ".join(reversed(pair) if swapped else pair))

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
        return Symbol(f"({self.name} != {self.body.in_c(other)})", self.body)

    def __eq__(self, other: object) -> Any:
        return Symbol(f"({self.name} == {self.body.in_c(other)})", self.body)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Symbol:
        if func not in _FUNCTIONS or kwargs:
            known = ", ".join(known.__name__ for known in _FUNCTIONS)
            raise NotImplementedError(
                f"rule: expected arithmetic and {known}, got {func.__name__}. Write the rule with "
                "those, or say in `_c_source.py` what it is in C."
            )
        body = next(arg for arg in args if isinstance(arg, Symbol)).body
        return body.write(_FUNCTIONS[func].format(*map(body.in_c, args), kind=body.kind))


# what torch computes, NaNs included; multiplying by 1 quiets a NaN and changes nothing else
_FUNCTIONS: dict[Any, str] = {
    torch.where: "{0} ? {1} : {2}",
    torch.maximum: "({0} > {1} || {0} != {0}) ? {0} : {1}",
    torch.sign: "({kind})(({0} > 0) - ({0} < 0))",
    power: "power({0}, {1})",
    sqrt64: "sqrt({0})",  # IEEE: rounded to nearest
}


def rule_source(rule: UpdateRule, moments: int) -> str:
    """Returns a function of C that updates one element.

    Args:
        rule: Whose `apply` is written out.
        moments: How many there are.

    Example:
        >>> print(rule_source(RULES["sgd"], 0))
        INLINE float sgd_0(float unscaled, float p, float *m, const float *s) {
            const float g = unscaled * s[0];
            const float t0 = p * s[1];
            const float t1 = g + t0;
            const float t2 = t1 * s[6];
            const float t3 = p - t2;
            return t3;
        }
        <BLANKLINE>
    """
    body = Body("float", " " * 4)

    def root(x: Any) -> Any:
        return body.write(f"sqrtf({x.name})")  # IEEE: rounded to nearest

    scalars: Any = [body.symbol(f"s[{i}]") for i in range(len(rule.columns))]
    old: Any = [body.symbol(f"m{i}") for i in range(moments)]
    grad, param = (body.symbol(name) for name in "gp")
    new_param, updated = rule.apply(grad, param, old, scalars, root)  # type: ignore[arg-type]
    return _RULE.format(
        name=f"{rule.name}_{moments}",
        old="".join(f"    const float m{i} = m[{i}];\n" for i in range(moments)),
        lines="\n".join(body.lines),
        new="".join(f"    m[{i}] = {body.in_c(m)};\n" for i, m in enumerate(updated)),
        param=body.in_c(new_param),
    )


def loop_names(rule: str, moments: int) -> list[str]:
    """Returns what C calls the loops of a rule, one for each format.

    Example:
        >>> loop_names("sgd", 1)[1:4]
        ['sgd_1_float16', 'sgd_1_bfloat16', 'sgd_1_to_float16']
    """
    return [f"{rule}_{moments}_{name}" for name in _FORMATS]


def loops_source(rule: str, moments: int) -> str:
    """Returns functions of C: the loops of a rule over elements of each format.

    Example:
        >>> print(loops_source("sgd", 1).split("}")[1])
        <BLANKLINE>
        LOOP uint32_t sgd_1_float16(ELEMENTS) {
            return update_lanes(sgd_1, 1, 7, FLOAT16, FLOAT16, PASSED_ON);
        <BLANKLINE>
    """
    return "".join(
        _LOOP.format(
            rule=f"{rule}_{moments}",
            format=name,
            moments=moments,
            columns=len(RULES[rule].columns),
            grad=grad,
            weight=weight,
        )
        for name, (grad, weight) in _FORMATS.items()
    )


def count_numbers(rule: UpdateRule) -> int:
    """Returns how many hyper-parameters a rule reads from a param group.

    Example:
        >>> count_numbers(RULES["lion"])
        5
    """
    optimizer: Any = rule.optimizers[0]
    return len(rule.numbers(optimizer([torch.zeros(1)]).param_groups[0], 0.0))


def scalars_source(rule: UpdateRule) -> str:
    """Returns a function of C that computes the scalars of one tensor.

    Args:
        rule: Whose `scalars` is written out.

    Example:
        >>> print(scalars_source(RULES["lion"]).split(";")[1])
        <BLANKLINE>
            const double t0 = n0 * n3
    """
    body = Body("double", " " * 4)
    count = count_numbers(rule)
    numbers: Any = [body.symbol(f"n{i}") for i in range(count)]
    values = rule.scalars(numbers, body.symbol("t"))  # type: ignore[arg-type]
    return _SCALARS.format(
        name=rule.name,
        numbers=", ".join(f"n{i} = n[{i}]" for i in range(count)),
        lines="\n".join(body.lines),
        stores="".join(f"    s[{i}] = (float){body.in_c(v)};\n" for i, v in enumerate(values)),
    )


def steps_header() -> str:
    """Returns the text of `_steps.h`: the functions of every rule, and tables of them."""
    functions = [
        source
        for name, count in STEPS
        for source in (rule_source(RULES[name], count), loops_source(name, count))
    ]
    functions += map(scalars_source, RULES.values())
    loops = [f"{{{', '.join(loop_names(name, count))}}}" for name, count in STEPS]
    most = max(count for _, count in STEPS)
    columns = [len(RULES[name].columns) for name, _ in STEPS]
    tables = (
        ("loop_t *const LOOPS[][FORMATS]", loops),
        ("const int MOMENTS[]", [count for _, count in STEPS]),
        ("const int COLUMNS[]", columns),
        ("scalars_t *const SCALARS[]", [f"{name}_scalars" for name, _ in STEPS]),
        ("const int NUMBERS[]", [count_numbers(RULES[name]) for name, _ in STEPS]),
    )
    return "\n".join(
        [
            "/* Generated from mpcore/updates by `make c-steps`. */\n",
            *functions,
            f"_Static_assert({most} <= MOST_MOMENTS && {max(columns)} <= MOST_COLUMNS, "
            '"`_loop.h` has too few");',
            *(f"static {kind} = {{{', '.join(map(str, values))}}};" for kind, values in tables),
            "",
        ]
    )


def write_header() -> None:
    """Writes `_steps.h`."""
    HEADER.write_text(steps_header(), encoding="utf-8")
