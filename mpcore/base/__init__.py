"""What every room uses: argument checks, many tensors at once, layouts and memory, host copies.

Its face is what is imported here; its modules are its own.
"""

from __future__ import annotations

from mpcore.base.bulk import (
    are_same,
    devices_of,
    dtypes_in_order,
    grads_of,
    have_shapes,
    with_gradient,
    writes_to,
)
from mpcore.base.checks import (
    FULL_PRECISION,
    LARGEST_SCALE,
    SIXTEEN_BIT,
    SMALLEST_SCALE,
    check_count,
    check_number,
    check_scale,
)
from mpcore.base.dtensors import (
    PLAIN,
    addresses_of,
    any_dtensor,
    held_here,
    is_placed_otherwise,
    placed_like,
    sharded_like,
)
from mpcore.base.gradient_set import GradientSet
from mpcore.base.graphs import outside_graphs, outside_graphs_step
from mpcore.base.host_copy import HostCopy, comes_late, is_capturing
from mpcore.base.kinds import Kinds
from mpcore.base.labels import label
from mpcore.base.layouts import laid_out_like, own_memory
from mpcore.base.machine import (
    Cpu,
    Gpu,
    cpu_name,
    examine_cpu,
    find_gpus,
    find_versions,
    torch_build,
)
from mpcore.base.memory import all_in_memory, can_be_stepped, why_no_memory
from mpcore.base.nested import map_tensors
from mpcore.base.parameter_set import ParameterSet
from mpcore.base.table import Table, capitalized

__all__ = [
    "FULL_PRECISION",
    "LARGEST_SCALE",
    "PLAIN",
    "SIXTEEN_BIT",
    "SMALLEST_SCALE",
    "Cpu",
    "Gpu",
    "GradientSet",
    "HostCopy",
    "Kinds",
    "ParameterSet",
    "Table",
    "addresses_of",
    "all_in_memory",
    "any_dtensor",
    "are_same",
    "can_be_stepped",
    "capitalized",
    "check_count",
    "check_number",
    "check_scale",
    "comes_late",
    "cpu_name",
    "devices_of",
    "dtypes_in_order",
    "examine_cpu",
    "find_gpus",
    "find_versions",
    "grads_of",
    "have_shapes",
    "held_here",
    "is_capturing",
    "is_placed_otherwise",
    "label",
    "laid_out_like",
    "map_tensors",
    "outside_graphs",
    "outside_graphs_step",
    "own_memory",
    "placed_like",
    "sharded_like",
    "torch_build",
    "why_no_memory",
    "with_gradient",
    "writes_to",
]
