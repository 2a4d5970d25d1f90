"""How good a domain's values turned out: predictions made before the labels were learnt, against those labels."""

from __future__ import annotations

from collections import deque

import numpy as np

from poise.domain import quality
from poise.value.rows import Floats


class TrackRecord:
    """The last `max_rows` pairs of prediction and sibling-mean reward."""

    def __init__(self, max_rows: int) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=max_rows)

    def add(self, predicted_n: Floats, realised_n: Floats) -> None:
        """Append n rows."""
        self._pairs.extend(zip(predicted_n.tolist(), realised_n.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._pairs)

    def pearson(self) -> float:
        """Return the correlation; NaN until it is defined."""
        predicted, realised = self._columns()
        return quality.pearson(predicted, realised)

    def brier(self) -> float:
        """Return the mean squared difference; NaN without rows."""
        predicted, realised = self._columns()
        return quality.mean_squared_error(predicted, realised)

    def _columns(self) -> tuple[Floats, Floats]:
        pairs = np.array(self._pairs, np.float32).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]
