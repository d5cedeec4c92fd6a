"""Which dtype computes what: casting a model, policies, and tensor cores emulated on a CPU.

Start with `cast_model.py`. Its face is what is imported here.
"""

from __future__ import annotations

from mpcore.precision.cast_model import cast_model, cast_report
from mpcore.precision.casts import is_rounded
from mpcore.precision.emulate import emulate_tensor_cores
from mpcore.precision.norms import LayerNorm, RMSNorm
from mpcore.precision.policy import Policy
from mpcore.precision.scope import global_policy, set_global_policy, use_policy

__all__ = [
    "LayerNorm",
    "Policy",
    "RMSNorm",
    "cast_model",
    "cast_report",
    "emulate_tensor_cores",
    "global_policy",
    "is_rounded",
    "set_global_policy",
    "use_policy",
]
