"""How good predictions of rewards were: the numbers shown to people. NaN where they are not defined."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def pearson(predicted: ArrayLike, realised: ArrayLike) -> float:
    """Return the correlation; NaN for fewer than two rows or a constant side."""
    x, y = np.asarray(predicted, np.float64).ravel(), np.asarray(realised, np.float64).ravel()
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def mean_squared_error(predicted: ArrayLike, realised: ArrayLike) -> float:
    """Return the mean squared difference (the Brier score when `realised` is 0 or 1); NaN without rows."""
    difference = np.asarray(predicted, np.float64) - np.asarray(realised, np.float64)
    return float(np.mean(difference**2)) if difference.size else float("nan")
