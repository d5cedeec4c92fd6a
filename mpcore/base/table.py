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

    def to_markdown(self) -> str:
        """Returns the table as Markdown, its title a heading.

        Example:
            >>> print(Table("Title", ("name", "n"), (("a", "1"),), ("Note.",)).to_markdown())
            ## Title
            <BLANKLINE>
            | name | n |
            |---|---|
            | a | 1 |
            <BLANKLINE>
            - Note.
            <BLANKLINE>
        """
        rows = [self.header, ("---",) * len(self.header), *self.rows]
        lines = [f"| {' | '.join(cells)} |" for cells in rows]
        lines[1] = lines[1].replace(" ", "")
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"## {self.title}", "", *lines, "", *notes, ""])


def capitalized(text: str) -> str:
    """Returns a text with a large first letter, the others as they are.

    Example:
        >>> capitalized("mAP"), capitalized("loss")
        ('MAP', 'Loss')
    """
    return text[:1].upper() + text[1:]
