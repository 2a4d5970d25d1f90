"""Styles figures, and exports them as inline SVG.

Figures support light and dark mode: their colours are CSS variables of the page (`--ink`, `--faint`, `--series-0` ...).
matplotlib draws with placeholder colours, which are then replaced. Text stays text. Figures do not use pyplot. Equal
inputs give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#010110", "#010111", "#010112"
_VARIABLES = {INK: "--ink", FAINT: "--faint", PAPER: "--paper"}
SERIES = [f"#0101{index:02x}" for index in range(8)]
_VARIABLES |= {colour: f"--series-{index}" for index, colour in enumerate(SERIES)}
BLUE, ORANGE, GREEN, PURPLE, ROSE, SKY, GOLD, GREY = SERIES

_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def extend_to_zero(axes: Axes, min_top: float = 0.0) -> None:
    """Extend the vertical axis to zero, with some space above the highest point."""
    bottom, top = axes.dataLim.intervaly
    if np.isfinite([bottom, top]).all():
        top = max(top, min_top, 1e-12)
        axes.set_ylim(min(0.0, bottom) - 0.03 * top, 1.08 * top)


def new_figure(height: float) -> Figure:
    """Return a figure of the page's width and `height` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7.2, height), layout="constrained")


def draw_legend(axes: Axes, *, below: bool = False, reverse: bool = False) -> None:
    """Put the legend beside or below the axes, where it hides no point."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if below:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), reverse=reverse, borderaxespad=0)


@contextmanager
def drawing_style(name: str) -> Iterator[None]:
    """Use the page's style instead of the user's matplotlibrc. `name` makes SVG ids unique on the page."""
    from matplotlib import style

    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        yield


def to_svg(figure: Figure, label: str) -> str:
    """Return the figure as an <svg> element without metadata, size or group ids; `label` is for screen readers."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None  # noqa: S101  (matplotlib always writes it)
    text = f'<svg {view_box[0]} role="img" aria-label="{label}">' + text[text.index(">") + 1 :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
