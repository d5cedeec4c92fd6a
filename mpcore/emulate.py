"""`emulate_tensor_cores`: see `mpcore.precision`."""

from mpcore.precision.emulate import emulate_tensor_cores as emulate_tensor_cores
