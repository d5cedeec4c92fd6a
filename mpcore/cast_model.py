"""`cast_model`: see `mpcore.precision`."""

from mpcore.precision.cast_model import cast_model as cast_model
