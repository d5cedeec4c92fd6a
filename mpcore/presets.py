"""`Presets`: see `mpcore.loss_scale`."""

from mpcore.loss_scale.presets import Presets as Presets
