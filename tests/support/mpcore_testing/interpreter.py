"""Triton's interpreter without what takes most of its time."""

from __future__ import annotations

from functools import cache
from typing import Any

from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction


def patch_language_once() -> None:
    """Lets device functions run in the language that their kernel's launch has patched already.

    The interpreter replaces the operations of `triton.language` when a kernel is launched. At every
    call of a device function it does so again, by the same ones: two thirds of the time of our
    kernels, which are made of such calls. What they compute stays the interpreter's own.

    Functions of Triton's own library see `triton.language.core` instead, which no launch patches:
    their first call does, for good.

    NumPy's type for one of Triton's is looked up at most operations, in a table that is made anew
    each time: it is remembered.
    """
    numpy_type = interpreter._get_np_dtype
    remembered = cache(numpy_type)

    def numpy_type_once(kind: Any) -> Any:
        element = kind.scalar  # of a block; else itself
        return remembered(element) if type(element) is tl.dtype else numpy_type(element)

    interpreter._get_np_dtype = numpy_type_once
    own = InterpretedFunction.__call__
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            patched.add(module)
            return own(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
