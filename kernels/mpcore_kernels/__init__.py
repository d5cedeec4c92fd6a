"""The Triton backend: the functions of `mpcore.backends.reference`, one launch over many tensors.

Importing this package needs torch and triton, and never mpcore. The functions run on CUDA and ROCm
tensors; with `TRITON_INTERPRET=1` in the environment *before* the first import they run on CPU
tensors instead, through Triton's interpreter: slow, and bit for bit the same.
"""

from mpcore_kernels.cast import cast_into as cast_into
from mpcore_kernels.inspection import Inspection as Inspection
from mpcore_kernels.inspection import inspect as inspect
from mpcore_kernels.launcher import Launcher as Launcher
from mpcore_kernels.scale import update_scale_ as update_scale_
from mpcore_kernels.unscale import unscale_ as unscale_
from mpcore_kernels.unscale import unscale_into as unscale_into
from mpcore_kernels.widen import widen_into as widen_into

__all__ = [
    "Inspection",
    "Launcher",
    "cast_into",
    "inspect",
    "unscale_",
    "unscale_into",
    "update_scale_",
    "widen_into",
]
