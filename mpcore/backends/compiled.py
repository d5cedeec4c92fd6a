"""The compiled CPU backend: C that is written from the rules and compiled when it is first needed.

    unscale, cast, widen    the cpu backend's
    inspect                 its flags; norms within 1e-6            `_c_inspection.py`
    update                  the bits of the reference backend       `_c_update.py`

Every byte crosses memory once: a gradient, master, moments and weight are read, computed with in
registers and written, in one call for all tensors, on as many threads as torch uses. The arithmetic
is the rule's `apply`, operation by operation (`_c_source.py`), without contraction, so the
reference backend is the bitwise oracle of `update_`.

The first step compiles, which takes about a second per combination of rule and dtypes, once per
process, and a C compiler must be there. So it is chosen by name, `backend="compiled"`.
"""

from __future__ import annotations

from mpcore.backends._c_inspection import inspect
from mpcore.backends._c_update import plan_update, update_
from mpcore.backends._cast import widen_into
from mpcore.backends._scale import update_scale_
from mpcore.backends._update import prepare_
from mpcore.backends.cpu import cast_into, unscale_, unscale_into

__all__ = [
    "cast_into",
    "inspect",
    "plan_update",
    "prepare_",
    "unscale_",
    "unscale_into",
    "update_",
    "update_scale_",
    "widen_into",
]
