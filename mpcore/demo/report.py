"""The HTML report: one file, no network, no scripts."""

from __future__ import annotations

import html
import platform
import re

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import mpcore
from mpcore.demo.experiment import DemoResult
from mpcore.demo.figures import difference_figure, loss_figure, scale_figure
from mpcore.demo.tables import bytes_table, digits_table, gpt_table


def render_report(result: DemoResult) -> str:
    """Renders the report as one HTML page that fetches nothing.

    Args:
        result: What was measured.

    Returns:
        The page. Equal results give equal pages, but for the times taken.
    """
    environment = Environment(
        loader=PackageLoader("mpcore.demo"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["powers"] = with_powers
    return environment.get_template("report.html.j2").render(
        gpt=gpt_table(result),
        bytes=bytes_table(result),
        digits=digits_table(result),
        figures=[
            ("Training loss", Markup(loss_figure(result)), _LOSS),
            ("How far above FP32", Markup(difference_figure(result)), _DIFFERENCE),
            ("The loss scale finds its level", Markup(scale_figure(result)), _SCALE),
        ],
        corpus=result.corpus,
        seeds=result.settings.seeds,
        seconds=result.seconds,
        versions=_versions(result),
    )


def with_powers(text: str) -> Markup:
    """Escapes text for HTML, sets powers of two as superscripts, keeps 3e-5 on one line.

    Example:
        >>> with_powers("2^-10 < 1")
        Markup('2<sup>&minus;10</sup> &lt; 1')
    """
    unbroken = re.sub(r"(\de)-(\d)", r"\1&#8209;\2", html.escape(text))
    raised = re.sub(r"2\^(-?)(\d+)", r"2<sup>\1\2</sup>", unbroken)
    return Markup(raised.replace("<sup>-", "<sup>&minus;"))


_LOSS = (
    "Mean over the seeds, smoothed over a twentieth of the run. Curves of regimes that keep FP32 "
    "accuracy lie on top of each other."
)
_DIFFERENCE = (
    "The same curves minus that of FP32, batch by batch. FP16 without loss scaling leaves the "
    "frame upwards. A skipped step in the warm-up costs one step of learning, which shows early on."
)
_SCALE = (
    "First seed. A cross is a step that was skipped because a gradient overflowed; the scale is "
    "halved and the weights stay as they were."
)


def _versions(result: DemoResult) -> str:
    return (
        f"mpcore {mpcore.__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}, CPU threads: {result.settings.threads}"
    )
