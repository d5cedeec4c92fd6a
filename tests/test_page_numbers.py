"""The numbers below plots, colours that can be seen, and what a page says of when and where."""

from __future__ import annotations

import csv
import datetime
import io
import math
import re
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pytest
from mpcore.base import cpu_name
from mpcore.demo import figures
from mpcore.monitoring.findings import LOWEST
from mpcore.monitoring.reading import Reading
from mpcore.report import bars
from mpcore.report.bars import time_figure
from mpcore.report.page import Picture, Section, render_page
from mpcore.report.run_figures import what_if_figure
from mpcore.report.run_page import summary_table
from mpcore.report.svg import COLOURS, Plot, clipped, new_axes, to_svg

from mpcore.monitoring.run_log import RunLog  # isort: skip

WHITE = "#ffffff"


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: relative luminances, the lighter over the darker."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", WHITE) == pytest.approx(21)
    assert contrast("#777777", WHITE) == pytest.approx(4.48, abs=0.01)  # a well-known near miss


@pytest.mark.parametrize(
    "colour",
    sorted({*COLOURS, *bars._FILLS, *(colour for colour, _, _ in figures._STYLES.values())}),
)
def test_every_line_and_bar_can_be_seen_on_its_paper(colour: str) -> None:
    assert contrast(colour, WHITE) >= 3


def test_words_can_be_read_in_light_and_dark() -> None:
    page = render_page("Title", "Lead.", (), "")
    schemes = re.findall(r":root \{(.*?)\}", page)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        long = {name: value.replace("#fff", WHITE) for name, value in colours.items()}
        for name in ("ink", "soft", "link"):
            assert contrast(long[name], long["paper"]) >= 4.5
    assert set(re.findall(r"--(\w+):", schemes[1])) <= set(re.findall(r"--(\w+):", schemes[0]))


def plot(count: int, label: str = "run") -> Plot:
    figure, axes = new_axes("step", "loss")
    axes.plot(range(count), [1 / (step + 1) for step in range(count)], label=clipped(label))
    axes.plot([0, 7], [math.nan, 2.0], label="other")
    return to_svg(figure, "Losses", "loss")


def rendered(svg: Plot) -> tuple[str, list[list[str]]]:
    page = render_page("Title", "Lead.", (Section("Loss", (Picture(svg, "Caption."),)),), "")
    (link,) = re.findall(r'<a download="Loss.csv" href="data:text/csv;charset=utf-8,([^"]*)"', page)
    return page, [*csv.reader(io.StringIO(unquote(link)))]


def test_the_file_below_a_plot_has_every_number_of_it() -> None:
    page, rows = rendered(plot(100))
    assert rows[0] == ["step", "run", "other"]
    assert len(rows) == 101
    assert [float(row[1]) for row in rows[1:]] == [1 / (step + 1) for step in range(100)]
    assert rows[8] == ["7.0", "0.125", "2.0"]
    assert rows[2][2] == ""
    assert page.count('<th scope="row">') == 20
    assert "80 more rows are in the file" in page
    assert '<th scope="row">99</th><td>0.01</td>' in page


def test_a_short_table_shows_all_of_it() -> None:
    page, rows = rendered(plot(8))
    assert page.count('<th scope="row">') == len(rows) - 1 == 8
    assert "more rows" not in page


@pytest.mark.parametrize("label", ["costs $5", 'a "quoted", name', "<b>&", "naïve"])
def test_names_of_any_kind_are_columns(label: str) -> None:
    _, rows = rendered(plot(3, label))
    assert rows[0][1] == label


def test_series_with_the_same_short_name_keep_their_numbers() -> None:
    figure, axes = new_axes("step", "loss")
    for value in (1.0, 2.0):
        axes.plot([0], [value], label="same")
    assert to_svg(figure, "", "twice").data == (("step", "same", "same"), ((0.0, 1.0, 2.0),))


def test_bars_have_their_middles_as_places() -> None:
    figure, axes = new_axes("exponent", "share")
    axes.bar([-3, 4], [25.0, 75.0], width=0.86, label="step 5")
    header, rows = to_svg(figure, "", "bars").data
    assert header == ("exponent", "step 5")
    assert [(round(place, 9), height) for place, height in rows] == [(-3, 25.0), (4, 75.0)]


def test_quartiles_are_beside_times() -> None:
    svg = time_figure([("many", [0.001, 0.002, 0.003, 0.004, 0.005]), ("one", [0.5])], "time")
    assert 'aria-label="Milliseconds per step: many 3 (2 to 4), one 500"' in svg
    assert svg.data[1] == (("many", 2.0, 3.0, 4.0), ("one", 500.0, 500.0, 500.0))


def test_a_page_says_when_and_where_it_was_made() -> None:
    footer = render_page("Title", "", (), "End.").split("<footer>")[1]
    assert re.search(rf"End\. {datetime.date.today()}, ", footer)
    assert cpu_name() in footer.replace("&amp;", "&")


def reading(exponent: int, scale: float = 1024.0) -> Any:
    """A reading all of whose values have one exponent, scaled."""
    histogram = [0] * 40
    histogram[exponent - LOWEST] = 8
    fields = dict.fromkeys(Reading.__dataclass_fields__)
    return Reading(
        **{**fields, "histogram": tuple(histogram), "loss_scale": scale, "headroom_bits": 3.25}
    )  # type: ignore[arg-type]


def test_the_first_overflow_is_marked_at_the_lowest_scale_that_has_one() -> None:
    marked = what_if_figure(reading(10))
    shares = [(scale, over) for scale, _, over in marked.data[1]]
    first = min(scale for scale, over in shares if over > 0)
    assert first == 1024.0 * 2.0**6  # 2^10 times 2^6 is 2^16, which FP16 does not have
    plain = what_if_figure(reading(-24))
    assert all(over == 0 for _, _, over in plain.data[1])
    # Matplotlib writes each line of text as a comment beside its outlines
    assert "<!-- first overflow -->" in marked
    assert "<!-- at 65536 -->" in marked
    assert "first overflow" not in plain


def test_headroom_is_in_the_summary() -> None:
    log = RunLog("run", (), (reading(10),), ())
    table = summary_table([log, replace(log, name="without", readings=())])
    column = table.header.index("Headroom")
    assert [row[column] for row in table.rows] == ["3.2", ""]
