"""How a kernel is compiled and launched: one description for the launcher and for the audit.

A `Variant` holds everything that the machine code of a launch depends on, the target aside. A
kernel module builds it in one function of its own, from the dtypes of the table that it works on:

    def variant(source, destination) -> Variant: ...     # one combination of dtypes
    def variants() -> list[Variant]: ...                 # every one that its launchers can use

Launchers launch through it (`Variant.launch`), and the audit compiles from the same object
(`Variant.source` and `Variant.options`). `mpcore_audit.variants` collects those of all kernel
modules; the test suite fails on a launch of a variant that is not in that collection.

Two choices are written down for each launch and never inherited from the compiler's defaults:

- **Contraction** (`enable_fp_fusion`): whether `a * b + c` may be fused into one rounding.
- **Specialization**: none. Triton would otherwise compile a launch anew when an address happens to
  be a multiple of 16 or an integer happens to be 1, and such a variant nobody would have looked
  at. So kernels name every pointer in `do_not_specialize_on_alignment` and every integer in
  `do_not_specialize`; `Variant.specialized` lists what was forgotten. Alignment, where it counts,
  is found in the kernel (`_table.is_aligned`). Integers that select code are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Variant:
    """One combination of dtypes and constants in which a kernel is compiled and launched.

    Attributes:
        kernel: The function under `@triton.jit`.
        arguments: Types of the arguments that are no constants, in order, as Triton writes them:
            `"*i64"` for an int64 tensor, `"fp32"` for a Python float.
        constants: Names and values of the `tl.constexpr` arguments.
        num_warps: Warps per program.
        enable_fp_fusion: Whether multiplications and additions may be contracted.
        reads: Dtypes of the tensors of which a program reads each element of its chunk, once.
        writes: Dtypes of the tensors of which a program writes each element of its chunk, once.
        chunk: Elements per program; 0 if programs do not work on chunks of tensors.
        results: Dtypes of the numbers that a program writes about its chunk, each one once, or
            not at all if there is nothing to report.
        counters: Sizes of the groups of integers to which a program adds, each one once at most.
        additions: How often a thread adds to a counter on its own, at most: threads that wait for
            nobody cannot add up before what each of them counted.
        reductions: How many values a program reduces over its chunk; 0 for an elementwise kernel,
            which needs neither shared memory nor barriers.
    """

    kernel: Any
    arguments: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    enable_fp_fusion: bool
    reads: tuple[torch.dtype, ...] = ()
    writes: tuple[torch.dtype, ...] = ()
    chunk: int = 0
    results: tuple[torch.dtype, ...] = ()
    counters: tuple[int, ...] = ()
    additions: int = 0
    reductions: int = 0

    @property
    def name(self) -> str:
        """The kernel's name and the dtypes or constants that tell its variants apart."""
        values = [
            _shown(name, value)
            for name, value in self.constants
            if name not in ("CHUNK", "ROUND", "FINISH", "NUMBERS", "COLUMNS")
            and (name, value) != ("ADOPT", False)
        ]
        return " ".join([self.kernel.__name__.strip("_").removesuffix("_kernel"), *values])

    @property
    def bytes_needed(self) -> int:
        """Bytes that one element costs when each tensor is read or written once."""
        return sum(dtype.itemsize for dtype in self.reads + self.writes)

    @property
    def bytes_needed_per_chunk(self) -> int:
        """Bytes that a program writes about its chunk."""
        return sum(dtype.itemsize for dtype in self.results)

    def options(self) -> dict[str, Any]:
        """Returns the compiler options, the same for a launch and for the audit."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": self.enable_fp_fusion}

    def source(self) -> ASTSource:
        """Returns what the audit compiles; the kernel must not be interpreted."""
        names = [name for name in self.kernel.arg_names if name not in dict(self.constants)]
        return ASTSource(
            fn=self.kernel,
            signature=dict(zip(names, self.arguments, strict=True))
            | dict.fromkeys(dict(self.constants), "constexpr"),
            constexprs=dict(self.constants),
        )

    def specialized(self) -> list[str]:
        """Returns the arguments whose values a launch would compile into the code: none."""
        constants = dict(self.constants)
        types = iter(self.arguments)
        return [
            parameter.name
            for parameter in self.kernel.params
            if parameter.name not in constants and _is_specialized(parameter, next(types))
        ]

    def launch(self, programs: int, arguments: Sequence[Tensor | int | float]) -> None:
        """Queues one launch on the current stream of the first argument's device.

        Args:
            programs: How many programs run.
            arguments: Values of all arguments that are no constants, in order; the first one is
                a tensor.
        """
        with torch.cuda.device_of(arguments[0]):
            # by position: to bind the 22 arguments of `update_` by name takes Triton 3 us longer
            self.kernel[(programs,)](*arguments, **dict(self.constants), **self.options())


def _shown(name: str, value: Any) -> str:
    if isinstance(value, tl.dtype):
        return str(value)
    # a function that a kernel calls is known by its own name
    return getattr(value, "__name__", f"{name}={value}")


def argument_type(value: Tensor | int | float) -> str:
    """Returns the type that Triton gives an argument, written as in `Variant.arguments`.

    Example:
        >>> argument_type(torch.tensor(1.0)), argument_type(0.5), argument_type(2**40)
        ('*fp32', 'fp32', 'i64')
    """
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"*{triton.runtime.jit.type_canonicalisation_dict[name]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _is_specialized(parameter: Any, type: str) -> bool:
    if type.startswith("*"):
        return not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    return type != "fp32" and not parameter.do_not_specialize
