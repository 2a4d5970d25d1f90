"""Writes comparison.json, comparison.md and comparison.html."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from poise.report.comparison import figures
from poise.report.comparison.summary import AXES, Comparison, summarise_comparison
from poise.report.comparison.tables import headline, markdown, plain, tables
from poise.report.page import render_page
from poise.runtime.files.atomic import write_file


def write_comparison(comparison: Comparison, folder: Path) -> str:
    """Write the three files to `folder`, each atomically, and return a summary as text.

    Runs may be unfinished or not started.
    """
    from markupsafe import Markup

    tree = summarise_comparison(comparison)
    drawings = {axis: figures.curve_figure(tree, axis) for axis in AXES} | {"time": figures.time_figure(tree)}
    page = render_page(
        files(__package__).joinpath("comparison.html.j2").read_text(encoding="utf-8"),
        name=tree["name"],
        headline=headline(tree),
        spreads=sorted({run["spread"] for run in tree["runs"].values()}),
        figures={name: Markup(svg) if svg else None for name, svg in drawings.items()},  # noqa: S704  (our own SVG)
        tables=tables(tree),
    )
    write_file(folder / "comparison.json", (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode())
    write_file(folder / "comparison.md", markdown(tree).encode())
    write_file(folder / "comparison.html", page.encode())
    return f"{plain(tree)}\n\nreport: {folder / 'comparison.html'}"
