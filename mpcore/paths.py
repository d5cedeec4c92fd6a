"""`GroupPath`: see `mpcore.engine`."""

from mpcore.engine.paths import GroupPath as GroupPath
