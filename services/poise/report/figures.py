"""The figures of a run's report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from poise.algorithms.prediction_quality import CalibrationBin, calibration, pearson
from poise.report.curves import (
    BASELINES,
    PHASES,
    Doubles,
    Evaluation,
    Row,
    RunRecord,
    moving_mean,
    prediction_pairs,
    running_mean,
    second_half,
    series,
    smoothing_window,
    thinned,
)
from poise.report.drawing import (
    BLUE,
    FAINT,
    GOLD,
    GREEN,
    GREY,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    draw_legend,
    drawing_style,
    extend_to_zero,
    new_figure,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS = 400
_MAX_SCATTER = 1500


def reward_figure(record: RunRecord) -> str | None:
    """Plot the training reward of each step, its moving mean, and the held-out rewards with intervals."""
    if not record.metrics and not record.evaluations:
        return None
    with drawing_style("reward"):
        figure = new_figure(3.0)
        axes = figure.subplots()
        if record.metrics:
            steps, rewards = _steps(record.metrics), series(record.metrics, "reward", "mean")
            smooth = moving_mean(rewards, smoothing_window(len(steps)))
            axes.plot(*thinned(steps, rewards, _MAX_POINTS), color=BLUE, alpha=0.35, linewidth=1, marker=_marker(steps))
            if smoothing_window(len(steps)) > 1:
                axes.plot(*thinned(steps, smooth, _MAX_POINTS), color=BLUE, label="training, moving mean")
            else:
                axes.plot([], [], color=BLUE, alpha=0.5, label="training")
        _draw_evaluations(axes, record.evaluations)
        axes.set(ylabel="reward")
        _step_axis(axes)
        extend_to_zero(axes)
        draw_legend(axes)
        return to_svg(figure, "Reward by step")


def calibration_figure(rows: list[Row]) -> str | None:
    """Plot predicted against realised values of the second half, with bin means and the diagonal."""
    predicted, realised = prediction_pairs(second_half(rows))
    if not predicted.size:
        return None
    with drawing_style("calibration"):
        figure = new_figure(3.4)
        axes = figure.subplots()
        shown = np.unique(np.linspace(0, predicted.size - 1, min(predicted.size, _MAX_SCATTER)).astype(int))
        # With few siblings, realised values have few levels; jitter separates the points.
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, shown.size)
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label="perfect")
        axes.scatter(predicted[shown], realised[shown] + jitter, s=7, color=BLUE, alpha=0.22, linewidths=0)
        _draw_bins(axes, calibration(predicted, realised))
        axes.set(xlabel="predicted value", ylabel="realised reward")
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.06, 1.06))
        axes.set_box_aspect(0.8)
        correlation = pearson(predicted, realised)
        if np.isfinite(correlation):
            axes.set_title(f"Pearson r = {correlation:.2f}")
        draw_legend(axes)
        return to_svg(figure, "Predicted against realised values")


def variance_figure(rows: list[Row]) -> str | None:
    """Plot the squared advantage of each baseline: moving mean, and mean over all steps so far.

    It is weighted by squared score norms, if the run recorded that.
    """
    kind, label = "weighted_advantage_variance", "weighted squared advantage"
    if np.isnan(series(rows, kind, "none")).all():
        kind, label = "advantage_variance", "squared advantage"
    variances = {name: series(rows, kind, name) for name in BASELINES}
    if all(np.isnan(values).all() for values in variances.values()):
        return None
    labels = {"used": "used", "none": "no baseline", "rloo": "RLOO", "batch_mean": "batch mean"}
    colours = {"used": BLUE, "none": GREY, "rloo": ORANGE, "batch_mean": GREEN}
    with drawing_style("variance"):
        figure = new_figure(3.0)
        moving, running = figure.subplots(1, 2, sharey=True)
        steps = _steps(rows)
        window = smoothing_window(len(steps))
        for name in reversed(BASELINES):
            width = 2.4 if name == "used" else 1.4
            for axes, values in (
                (moving, moving_mean(variances[name], window)),
                (running, running_mean(variances[name])),
            ):
                points = thinned(steps, values, _MAX_POINTS)
                axes.plot(*points, color=colours[name], linewidth=width, label=labels[name], marker=_marker(steps))
        moving.set(ylabel=label, title=_window_title(window))
        running.set(title="mean of all steps so far")
        _step_axis(moving)
        _step_axis(running)
        extend_to_zero(moving)
        draw_legend(running)
        return to_svg(figure, "Squared advantage by step")


def time_figure(rows: list[Row]) -> str | None:
    """Plot the seconds of every step, stacked by phase. Phases of steps sampled ahead overlap with other steps."""
    times = {phase: np.nan_to_num(series(rows, "time_s", phase)) for phase in PHASES}
    total = sum(values.sum() for values in times.values())
    if not total:
        return None
    colours = dict(zip(PHASES, (BLUE, GOLD, GREEN, GREY, SKY, ORANGE, PURPLE), strict=True))
    with drawing_style("time"):
        figure = new_figure(3.0)
        axes = figure.subplots()
        steps = _steps(rows)
        thin = {phase: thinned(steps, values, 120) for phase, values in times.items()}
        centres = next(iter(thin.values()))[0]
        bottoms = np.zeros_like(centres)
        width = float(np.diff(centres).min()) if centres.size > 1 else 1.0
        for phase in PHASES:
            label = f"{phase} {100 * times[phase].sum() / total:.0f} %"
            axes.bar(centres, thin[phase][1], width, bottoms, color=colours[phase], linewidth=0, label=label)
            bottoms = bottoms + thin[phase][1]
        axes.set(ylabel="seconds per step")
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.01)
        _step_axis(axes)
        draw_legend(axes, reverse=True)
        return to_svg(figure, "Seconds of each phase by step")


def health_figure(rows: list[Row]) -> str | None:
    """Plot the mismatch between engine and learner, and the staleness of the rollouts."""
    mismatch = series(rows, "learner", "mismatch_logprob")
    divergence = series(rows, "learner", "mismatch_kl")
    mean, most = series(rows, "staleness", "mean"), series(rows, "staleness", "max")
    if all(np.isnan(values).all() for values in (mismatch, divergence, mean, most)):
        return None
    with drawing_style("health"):
        figure = new_figure(2.6)
        left, right = figure.subplots(1, 2)
        steps = _steps(rows)
        for axes, values, colour, label in (
            (left, mismatch, ORANGE, "mean |Δ log p| per token"),
            (left, divergence, PURPLE, "KL per token"),
            (right, most, GREY, "max"),
            (right, mean, BLUE, "mean"),
        ):
            axes.plot(*thinned(steps, values, _MAX_POINTS), color=colour, label=label, marker=_marker(steps))
        left.set(title="mismatch of engine and learner")
        right.set(title="staleness, in policy versions")
        _step_axis(left)
        _step_axis(right)
        extend_to_zero(left)
        extend_to_zero(right, min_top=1.0)
        draw_legend(left, below=True)
        draw_legend(right, below=True)
        return to_svg(figure, "Mismatch and staleness by step")


def _draw_evaluations(axes: Axes, evaluations: list[Evaluation]) -> None:
    if not evaluations:
        return
    means = [evaluation.interval.mean for evaluation in evaluations]
    below = [evaluation.interval.mean - evaluation.interval.low for evaluation in evaluations]
    above = [evaluation.interval.high - evaluation.interval.mean for evaluation in evaluations]
    axes.errorbar(
        [evaluation.step for evaluation in evaluations],
        means,
        # Rounding may make a length slightly negative.
        yerr=np.maximum([below, above], 0),
        fmt="o",
        color=ORANGE,
        capsize=4,
        markersize=6,
        label="held-out, 95 % interval",
        zorder=5,
    )


def _draw_bins(axes: Axes, bins: list[CalibrationBin]) -> None:
    largest = max(one.count for one in bins)
    axes.plot([one.predicted for one in bins], [one.realised for one in bins], color=ORANGE, linewidth=1.4)
    axes.scatter(
        [one.predicted for one in bins],
        [one.realised for one in bins],
        s=[14 + 70 * one.count / largest for one in bins],
        color=ORANGE,
        edgecolors=PAPER,
        linewidths=0.8,
        zorder=4,
        label="bin mean",
    )


def _steps(rows: list[Row]) -> Doubles:
    return series(rows, "step")


def _marker(steps: Doubles) -> str:
    """Return the marker: a dot for a single step, because a line needs two points."""
    return "o" if steps.size == 1 else "none"


def _step_axis(axes: Axes) -> None:
    """Label integer steps only, and widen the axis for a single step."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    left, right = axes.get_xlim()
    if right - left < 1.5:
        axes.set_xlim(left - 1, right + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))


def _window_title(window: int) -> str:
    return "each step" if window == 1 else f"moving mean of {window} steps"
