"""`save`, `load`: see `mpcore.checkpoint`."""

from mpcore.checkpoint.file import load as load
from mpcore.checkpoint.file import save as save
