"""`ScaledLoss`: see `mpcore.loss_scale`."""

from mpcore.loss_scale.losses import ScaledLoss as ScaledLoss
