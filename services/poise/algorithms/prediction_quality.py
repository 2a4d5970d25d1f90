"""Quality of reward predictions: correlation, Brier score, bias, calibration. Undefined values are NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Rollouts with similar predictions."""

    predicted: float
    """Mean prediction."""
    realised: float
    """Mean of the realised values."""
    count: int


def pearson(predicted: ArrayLike, realised: ArrayLike) -> float:
    """Return Pearson's correlation; NaN for fewer than two rows or if either side is constant."""
    x, y = _columns(predicted, realised)
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def mean_squared_error(predicted: ArrayLike, realised: ArrayLike) -> float:
    """Return the mean squared difference (the Brier score when `realised` is 0 or 1); NaN for no rows."""
    x, y = _columns(predicted, realised)
    return float(np.mean((x - y) ** 2)) if x.size else float("nan")


def brier_skill(predicted: ArrayLike, realised: ArrayLike) -> float:
    """Return 1 − Brier / Brier of always predicting the mean of `realised`.

    1 is perfect; 0 is no better than the constant. NaN if `realised` does not vary.
    """
    y = np.asarray(realised, np.float64)
    variance = float(np.var(y)) if y.size else 0.0
    return 1 - mean_squared_error(predicted, realised) / variance if variance > 0 else float("nan")


def bias(predicted: ArrayLike, realised: ArrayLike) -> float:
    """Return mean(predicted − realised); positive values are too optimistic. NaN for no rows."""
    x, y = _columns(predicted, realised)
    return float(np.mean(x - y)) if x.size else float("nan")


def share_clipped(predicted: ArrayLike) -> float:
    """Return the share of predictions that are clipped to 0 or 1. NaN for no rows."""
    x = np.asarray(predicted, np.float64)
    return float(np.mean((x <= 0) | (x >= 1))) if x.size else float("nan")


def calibration(predicted: ArrayLike, realised: ArrayLike, num_bins: int = 10) -> list[CalibrationBin]:
    """Return mean prediction and mean realised value in equal-width bins of the prediction, without empty bins."""
    x, y = _columns(predicted, realised)
    bins = np.clip((x * num_bins).astype(int), 0, num_bins - 1)
    return [
        CalibrationBin(float(x[inside].mean()), float(y[inside].mean()), int(inside.sum()))
        for index in range(num_bins)
        if (inside := bins == index).any()
    ]


def _columns(predicted: ArrayLike, realised: ArrayLike) -> tuple[Doubles, Doubles]:
    return np.asarray(predicted, np.float64).ravel(), np.asarray(realised, np.float64).ravel()
