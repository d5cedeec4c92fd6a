"""A griffe extension: the section "Example:" of a docstring is shown as examples are."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Gives "Example:" the plural that griffe's Google style knows.

    Without it the section would become an admonition, and its `>>>` lines block quotes.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the heading in the docstring of `obj`."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
