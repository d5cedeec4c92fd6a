"""The Triton backend: the functions of `mpcore.backends.reference`, one launch over many tensors.

Importing this package needs torch and triton, and never mpcore. The functions run on CUDA and ROCm
tensors; with `TRITON_INTERPRET=1` in the environment *before* the first import they run on CPU
tensors instead, through Triton's interpreter: slow, and bit for bit the same.
"""

from mpcore_kernels._update_plan import Plan as Plan
from mpcore_kernels.adopt import adopt_ as adopt_
from mpcore_kernels.cast import cast_into as cast_into
from mpcore_kernels.inspection import Inspection as Inspection
from mpcore_kernels.inspection import inspect as inspect
from mpcore_kernels.launcher import Launcher as Launcher
from mpcore_kernels.scale import update_scale_ as update_scale_
from mpcore_kernels.unscale import unscale_ as unscale_
from mpcore_kernels.unscale import unscale_into as unscale_into
from mpcore_kernels.update import plan_update as plan_update
from mpcore_kernels.update import prepare_ as prepare_
from mpcore_kernels.update import update_ as update_

__all__ = [
    "Inspection",
    "Launcher",
    "Plan",
    "adopt_",
    "cast_into",
    "inspect",
    "plan_update",
    "prepare_",
    "unscale_",
    "unscale_into",
    "update_",
    "update_scale_",
]
