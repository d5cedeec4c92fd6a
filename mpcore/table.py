"""A table of text, for the terminal and for HTML."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: One line.
        header: Names of the columns; the first column holds names, the others numbers.
        rows: One tuple of cells per row.
        notes: What a reader must know to believe the numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def without_title(self) -> Table:
        """Returns the table for a place that says its title already.

        Example:
            >>> Table("Title", ("a",), (), ()).without_title().title
            ''
        """
        return replace(self, title="")
