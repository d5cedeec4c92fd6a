"""The optimizer's state_dict: the versioned section, states, sums, files.

Start with `section.py`. Its face is what is imported here.
"""

from __future__ import annotations

from mpcore.checkpoint.section import SECTION, VERSION, new_section, read_section, section_in
from mpcore.checkpoint.states import read_states
from mpcore.checkpoint.sums import read_sums, sums_section

__all__ = [
    "SECTION",
    "VERSION",
    "new_section",
    "read_section",
    "read_states",
    "read_sums",
    "section_in",
    "sums_section",
]
