"""Matplotlib figures as inline SVG that takes its colours from the page.

Text stays text, and every colour is a CSS variable of the report's style sheet, so that one SVG
serves light, dark and paper. The colours below are only placeholders, exchanged when the figure is
written; the palette that stands behind them is Okabe and Ito's, which colour-blind readers can
tell apart.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedpriv.reporting.reader import Run

INK, FAINT, GRID = "#010101", "#020202", "#030303"
#: One colour a series; a ninth series starts again, with another dash.
SERIES = tuple(f"#0{index}0404" for index in range(1, 7))
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))

_CSS = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES, start=1)},
}

_WIDTH_INCHES, _HEIGHT_INCHES = 4.8, 3.0
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "axes.prop_cycle": cycler(color=list(SERIES)),
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Attributes:
        key: its anchor, unique on a page.
        title: what it shows, in a few words.
        caption: how to read it.
        svg: an `<svg>` element.
    """

    key: str
    title: str
    caption: str
    svg: str


def colour(index: int) -> str:
    """Return the colour of series `index`, counted from 0."""
    return SERIES[index % len(SERIES)]


def dash(index: int) -> str | tuple[int, tuple[float, ...]]:
    """Return the dash of series `index`, counted from 0."""
    return _DASHES[index % len(_DASHES)]


@dataclass(frozen=True)
class Marked:
    """A run in a figure.

    Attributes:
        run: the run.
        mark: what its lines are labelled with, `A`; empty where it is the only one.
        index: its place in the palette.
    """

    run: Run
    mark: str
    index: int

    def label(self, text: str = "") -> str:
        """Return `text` with the run's mark before it."""
        return f"{self.mark} {text}".strip()

    def shade(self, line: int = 0) -> str:
        """Return the colour of the run's line `line`: one run may use the whole palette."""
        return colour(self.index if self.mark else line)


class Canvas:
    """One figure while it is drawn."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()

    def plot(self, key: str, title: str, caption: str) -> Plot:
        """Return the finished figure."""
        text = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": key}):
            self.figure.savefig(text, format="svg", transparent=True)
        return Plot(key, title, caption, _inline(text.getvalue(), title))


@contextmanager
def canvas(height: float = _HEIGHT_INCHES) -> Iterator[Canvas]:
    """Give a figure with one pair of axes, in the report's style; `height` is in inches."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Canvas(height)


def _inline(document: str, title: str) -> str:
    """Cut what only a file of its own needs, and exchange placeholders for CSS variables."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for placeholder, css in _CSS.items():
        svg = svg.replace(placeholder, css)
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
