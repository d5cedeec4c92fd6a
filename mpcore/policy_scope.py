"""`set_global_policy`, `global_policy`, `use_policy`: see `mpcore.precision`."""

from mpcore.precision.scope import global_policy as global_policy
from mpcore.precision.scope import set_global_policy as set_global_policy
from mpcore.precision.scope import use_policy as use_policy
