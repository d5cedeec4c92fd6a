"""Draws the two pictures of README.md into docs/pictures/: `make pictures`, some minutes.

`loss.svg` is the figure of `mpcore demo`, drawn on white, since a reader's page may be dark.
`overflow.svg` is what a `mpcore.Monitor` says of a batch with a wrong label.
"""

from __future__ import annotations

import html
import re
import textwrap
from pathlib import Path

import mpcore
import torch

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
COLUMNS, ADVANCE, LINE, MARGIN = 96, 7.83, 19, 16
BAD_STEP = 250


def spike() -> str:
    """Trains a small network, one batch of which has a wrong label; returns the report on it."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    model = torch.nn.Sequential(*layers)
    inner = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    optimizer = mpcore.MixedPrecisionOptimizer(inner, mpcore.DynamicLossScale(2.0**12))
    model = mpcore.cast_model(model, torch.float16, optimizer)
    generator = torch.Generator().manual_seed(1)
    with mpcore.Monitor(optimizer, model, every=50) as monitor:
        for step in range(BAD_STEP + 1):
            x = torch.randn(32, 8, generator=generator)
            y = x.sum(1, keepdim=True)
            if step == BAD_STEP:
                y[7] = 4000.0
            optimizer.backward((model(x).float() - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return str(monitor.report())


def drawn(text: str) -> str:
    """Returns text as lines of an SVG picture, the first paragraph dark and the facts soft.

    Example:
        >>> drawn("a < b").count("<text")
        1
    """
    lines = [
        (part, "#1c2430" if number == 0 else "#5b6675")
        for number, line in enumerate(text.splitlines())
        for part in textwrap.wrap(line, COLUMNS)
    ]
    width, height = 2 * MARGIN + round(COLUMNS * ADVANCE), 2 * MARGIN + LINE * len(lines)
    rows = "".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE * (row + 0.75):g}" fill="{colour}" '
        f'xml:space="preserve">{html.escape(part)}</text>\n'
        for row, (part, colour) in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(text)}" '
        'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" '
        f'font-size="13">\n<rect width="{width}" height="{height}" fill="#f6f8fa"/>\n'
        f'<rect width="4" height="{height}" fill="#d94801"/>\n{rows}</svg>\n'
    )


def on_white(svg: str) -> str:
    """Puts a white ground under a figure, gives it a width, and drops digits that nobody sees.

    Example:
        >>> on_white('<svg viewBox="0 0 1 1"><path d="M 0.1234"/></svg>').split("><")[0]
        '<svg width="660" viewBox="0 0 1 1"'
    """
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg).replace("<svg ", '<svg width="660" ', 1)
    end = svg.index(">") + 1
    return f'{svg[:end]}<rect width="100%" height="100%" fill="#fff"/>{svg[end:]}'


def demo_losses() -> str:
    """Runs the whole demo and returns its figure of losses."""
    from mpcore.demo.experiment import make_settings, run_demo
    from mpcore.demo.figures import loss_figure

    class Silent:
        def begin(self, label: str, total: int) -> object:
            print(f"{label}: {total}")
            return lambda done, note: None

    return loss_figure(run_demo(make_settings(), Silent()))


def main() -> None:
    """Writes both pictures."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "overflow.svg").write_text(drawn(spike()), encoding="utf-8")
    (FOLDER / "loss.svg").write_text(on_white(demo_losses()), encoding="utf-8")


if __name__ == "__main__":
    main()
