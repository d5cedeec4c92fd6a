"""`ScalerStep`: see `mpcore.amp`."""

from mpcore.amp.scaler_step import ScalerStep as ScalerStep
