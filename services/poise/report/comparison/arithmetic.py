"""Reward curves: level crossings, and means over seeds with intervals.

Curves are piecewise linear between their points and undefined outside.

Shapes: S seeds, X points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.report.statistics import Interval

Doubles = NDArray[np.float64]

NUM_LEVELS = 5
_LEVEL_PLACES = 3

_T_975 = {2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}
"""97.5 % quantile of Student's t by degrees of freedom. From ten on, a Cornish-Fisher series is equally
accurate."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Rewards against tokens or seconds."""

    x: Doubles
    """Increasing."""
    y: Doubles


@dataclass(frozen=True, slots=True)
class MeanCurve:
    """The mean of several seeds' curves, where all of them are defined."""

    curve: Curve
    low: Doubles
    high: Doubles
    """Bounds as in `spread`."""


def make_curve(points: Iterable[tuple[float, float]]) -> Curve:
    """Return the curve through points (x, y). Of points with equal x, the last counts; points with NaN are ignored."""
    known = {x: y for x, y in points if not np.isnan([x, y]).any()}
    xs = sorted(known)
    return Curve(np.array(xs, np.float64), np.array([known[x] for x in xs], np.float64))


def crossing(curve: Curve, level: float) -> float | None:
    """Return the first x at which the curve reaches `level`; None if it never does."""
    reached = np.flatnonzero(curve.y >= level)
    if not reached.size:
        return None
    index = int(reached[0])
    if index == 0:
        return float(curve.x[0])
    (x0, x1), (y0, y1) = curve.x[index - 1 : index + 1], curve.y[index - 1 : index + 1]
    return float(x0 + (level - y0) / (y1 - y0) * (x1 - x0))


def mean_curve(curves: Sequence[Curve]) -> MeanCurve | None:
    """Return the mean at each curve's x where all curves are defined; None if there is no such x."""
    curves = [curve for curve in curves if curve.x.size]
    if not curves:
        return None
    first, last = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = x[(x >= first) & (x <= last)]
    if not x.size:
        return None
    y_SX = np.stack([np.interp(x, curve.x, curve.y) for curve in curves])
    spreads = [spread(y_S.tolist()) for y_S in y_SX.T]
    return MeanCurve(
        Curve(x, y_SX.mean(axis=0)), np.array([one.low for one in spreads]), np.array([one.high for one in spreads])
    )


def spread(values_S: Sequence[float]) -> Interval:
    """Return the mean over seeds with bounds.

    For three seeds or more, they are the 95 % interval of the mean by Student's t; for two, minimum and maximum.
    """
    values = np.asarray(values_S, np.float64)
    mean = float(values.mean())
    if values.size < 3:
        return Interval(mean, float(values.min()), float(values.max()))
    half = t_quantile(values.size - 1) * float(values.std(ddof=1)) / values.size**0.5
    return Interval(mean, mean - half, mean + half)


def describe_spread(num_seeds: int) -> str:
    """Return what the bounds of `spread` mean for this number of seeds, as text."""
    if num_seeds >= 3:
        return f"95 % interval of the mean over {num_seeds} seeds (Student's t)"
    return "minimum and maximum of 2 seeds" if num_seeds == 2 else "one seed, no interval"


def t_quantile(num_degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, for at least two degrees of freedom."""
    n = float(num_degrees)
    return _T_975.get(num_degrees, 1.95996 + 2.37227 / n + 2.8225 / n**2 + 2.5558 / n**3)


def common_levels(curves: Sequence[Curve], num_levels: int = NUM_LEVELS) -> list[float]:
    """Return equally spaced levels from the mean start of the curves to the lowest of their maxima.

    The last one is the highest level that all curves reach. Empty if a curve never rises above the start.
    """
    curves = [curve for curve in curves if curve.x.size > 1]
    if not curves:
        return []
    start = float(np.mean([curve.y[0] for curve in curves]))
    end = min(float(curve.y.max()) for curve in curves)
    scale = 10**_LEVEL_PLACES  # rounds down, so that all curves still reach the level
    levels = {float(np.floor(level * scale) / scale) for level in np.linspace(start, end, num_levels + 1)[1:]}
    return sorted(level for level in levels if level > start)


def ratio(value: float | None, reference: float | None) -> float | None:
    """Return value / reference; None if either is missing or the reference is 0."""
    return None if value is None or not reference else value / reference
