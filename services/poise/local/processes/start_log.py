"""Decide when to log the progress of a start: every change, and an unchanged state at growing intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence

from poise.runtime.startup import without_elapsed

_LONGEST_S = 120.0


class StartLog:
    """Limits how often the progress of one start is logged."""

    def __init__(self, every_s: float) -> None:
        """Log at most once per `every_s` seconds. The first log comes after `every_s`."""
        self._every_s = every_s
        self._interval_s = every_s
        self._logged_s = time.monotonic()
        self._stages = ""

    def is_due(self, reasons: Sequence[str]) -> bool:
        """Return whether to log `reasons` now. If so, they count as logged."""
        stages = without_elapsed("; ".join(reasons))
        is_new = stages != self._stages
        now_s = time.monotonic()
        if now_s - self._logged_s <= (self._every_s if is_new else self._interval_s):
            return False
        self._interval_s = self._every_s if is_new else min(2 * self._interval_s, max(_LONGEST_S, self._every_s))
        self._logged_s, self._stages = now_s, stages
        return True
