"""`Policy`: see `mpcore.precision`."""

from mpcore.precision.policy import Policy as Policy
