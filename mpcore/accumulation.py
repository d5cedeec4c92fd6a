"""`Overflow`: see `mpcore.masters`."""

from mpcore.masters.sums import Overflow as Overflow
