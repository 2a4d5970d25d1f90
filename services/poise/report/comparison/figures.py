"""The figures of a comparison: rewards against tokens and seconds, and time per phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from poise.report.curves import PHASES
from poise.report.drawing import (
    FAINT,
    SERIES,
    draw_legend,
    drawing_style,
    new_figure,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"tokens": "response tokens sampled for training", "seconds": "seconds of training"}


def curve_figure(tree: Mapping[str, Any], axis: str) -> str | None:
    """Plot each run's mean held-out reward with its interval against `axis`, and single seeds as thin lines."""
    if not any(run["curves"][axis] for run in tree["runs"].values()):
        return None
    with drawing_style(f"reward-{axis}"):
        figure = new_figure(3.4)
        axes = figure.subplots()
        for level in tree["levels"]:
            axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        for index, (name, run) in enumerate(tree["runs"].items()):
            _draw_run(axes, name, run, axis, SERIES[index % len(SERIES)])
        axes.set(xlabel=_LABELS[axis], ylabel="held-out reward")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        draw_legend(axes)
        return to_svg(figure, f"Held-out reward by {_LABELS[axis]}")


def _draw_run(axes: Axes, name: str, run: Mapping[str, Any], axis: str, colour: str) -> None:
    key = {"tokens": "tokens", "seconds": "wall_s"}[axis]
    for seed in run["seeds"].values():
        points = [(one[key], one["mean"]) for one in seed["evaluations"] if one[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.3, linewidth=0.8)
    if curve := run["curves"][axis]:
        axes.plot(curve["x"], curve["mean"], color=colour, label=name, marker="o", markersize=2.5)
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)


def time_figure(tree: Mapping[str, Any]) -> str | None:
    """Plot the seconds of training of each run, stacked by phase."""
    runs = {name: run for name, run in tree["runs"].items() if run["time_s"]["total"]}
    if not runs:
        return None
    with drawing_style("time"):
        figure = new_figure(0.9 + 0.35 * len(runs))
        axes = figure.subplots()
        left = np.zeros(len(runs))
        for phase, colour in zip(PHASES, SERIES, strict=False):
            seconds = np.array([(run["time_s"][phase] or {"mean": 0.0})["mean"] for run in runs.values()])
            axes.barh(list(runs), seconds, left=left, color=colour, height=0.6, label=phase)
            left += seconds
        axes.invert_yaxis()
        axes.set(xlabel="seconds, mean over seeds")
        draw_legend(axes)
        return to_svg(figure, "Seconds of training by phase")
