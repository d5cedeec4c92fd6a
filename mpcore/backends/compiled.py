"""The compiled CPU backend: C that is written from the rules; what "auto" takes on a CPU.

    unscale, cast           the cpu backend's
    adopt                   the bits of the reference backend       `_c_adopt.py`
    inspect                 its flags; norms rounded once           `_c_inspection.py`
    prepare, update         the bits of the reference backend       `_c_scalars.py`, `_c_update.py`
    the scale's move        likewise                                `_c_scale.py`

Every byte crosses memory once: a gradient, master, moments and weight are read, computed with in
registers and written, in one call for all tensors, on as many threads as torch uses. What is kept
in other stores than float32 is decoded and encoded in tiles that stay in the first-level cache. The
arithmetic is the rule's `apply`, operation by operation (`_c_source.py`), without contraction, so
the reference backend is the bitwise oracle of `update_`.

The library comes with the package, compiled when that is built or installed (`hatch_build.py`). A
package that was built without a compiler has none: "auto" is then the cpu backend, and asking for
this one by name compiles it in the first step, in about a second, once per process.
"""

from __future__ import annotations

from mpcore.backends._c_adopt import adopt_
from mpcore.backends._c_inspection import inspect
from mpcore.backends._c_scalars import prepare_
from mpcore.backends._c_scale import update_scale_
from mpcore.backends._c_update import plan_update, update_
from mpcore.backends.cpu import cast_into, unscale_, unscale_into

__all__ = [
    "adopt_",
    "cast_into",
    "inspect",
    "plan_update",
    "prepare_",
    "prepares_on_the_way",
    "unscale_",
    "unscale_into",
    "update_",
    "update_scale_",
]

#: See `Backend`.
prepares_on_the_way = False
