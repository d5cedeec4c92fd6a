"""A page of titles, tables, pictures and heat maps: one file that fetches nothing."""

from __future__ import annotations

import csv
import datetime
import html
import io
import math
import platform
import re
from dataclasses import dataclass
from urllib.parse import quote

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import mpcore
from mpcore.base import Table, cpu_name
from mpcore.report.svg import Plot

_ROWS = 20  # of the numbers below a plot


@dataclass(frozen=True)
class Text:
    """A paragraph. Powers such as 2^16 are set as such."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A plot, with its numbers below it as a table and as a file.

    Attributes:
        svg: From `mpcore.report.svg`.
        caption: What to see in it.
    """

    svg: Plot
    caption: str

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self.svg.data[0]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The numbers as text: some rows of many, evenly spread, the first and the last there."""
        rows = self.svg.data[1]
        count = min(len(rows), _ROWS)
        places = [round(i * (len(rows) - 1) / max(count - 1, 1)) for i in range(count)]
        return [tuple(map(_shown, rows[place])) for place in places]

    @property
    def left_out(self) -> int:
        """How many rows the table does not show, and the file does."""
        return len(self.svg.data[1]) - len(self.rows)

    @property
    def csv(self) -> str:
        """All numbers, as the address of a file that is in the page itself."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.svg.data[1])
        return "data:text/csv;charset=utf-8," + quote(text.getvalue().encode("utf-8", "replace"))


@dataclass(frozen=True)
class Cell:
    """A field of a heat map.

    Attributes:
        colour: Of CSS.
        shown: A sign in it.
        told: What it says in words, when it is pointed at and for screen readers.
    """

    colour: str
    shown: str
    told: str


@dataclass(frozen=True)
class HeatMap:
    """Fields in colours, with names at the left and steps above.

    Attributes:
        columns: Above the fields.
        rows: A name, and as many fields as there are columns.
        legend: Fields with what they mean.
        caption: What to see in it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    legend: tuple[tuple[Cell, str], ...]
    caption: str


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        when: Which step.
        facts: In a few words.
        text: In sentences.
        normal: Whether nothing has to be done.
    """

    when: str
    facts: str
    text: str
    normal: bool


@dataclass(frozen=True)
class Events:
    """What happened, one below the other."""

    events: tuple[Event, ...]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Above it.
        blocks: What it shows.
    """

    title: str
    blocks: tuple[Text | Picture | Table | HeatMap | Events, ...]


def render_page(title: str, lead: str, sections: tuple[Section, ...], footer: str) -> str:
    """Returns a page as HTML that fetches nothing and runs nothing.

    Args:
        title: Of the page.
        lead: A few sentences at the top.
        sections: In order.
        footer: At the end, before the versions.

    Example:
        >>> page = render_page("Title", "Lead.", (Section("Part", (Text("2^16 & more"),)),), "End.")
        >>> "<p>2<sup>16</sup> &amp; more</p>" in page
        True
    """
    environment = Environment(
        loader=PackageLoader("mpcore.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["powers"] = with_powers
    environment.filters["safe_svg"] = Markup
    environment.filters["kind"] = lambda block: type(block).__name__
    page = environment.get_template("page.html.j2").render(
        title=title, lead=lead, sections=sections, footer=footer, versions=_versions()
    )
    return page.encode("utf-8", "replace").decode()  # names of files may be in other codes


def _shown(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def with_powers(text: str) -> Markup:
    """Escapes text for HTML, sets powers of two as superscripts, keeps 3e-5 on one line.

    Example:
        >>> with_powers("2^-10 < 1")
        Markup('2<sup>&minus;10</sup> &lt; 1')
    """
    unbroken = re.sub(r"(\de)-(\d)", r"\1&#8209;\2", html.escape(text))
    raised = re.sub(r"2\^(-?)(\d+)", r"2<sup>\1\2</sup>", unbroken)
    return Markup(raised.replace("<sup>-", "<sup>&minus;"))


def _versions() -> str:
    return (
        f"{datetime.date.today()}, {cpu_name()}, {platform.system()}; mpcore {mpcore.__version__}, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    )
