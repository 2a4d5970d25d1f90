"""When to log what is still starting: at each change, and unchanged states at growing intervals."""

from __future__ import annotations

import time
from collections.abc import Sequence

from poise.runtime.startup import without_elapsed

_LONGEST_S = 120.0


class StartLog:
    """The messages of one wait."""

    def __init__(self, every_s: float) -> None:
        """Log at most once in `every_s`, and nothing before that."""
        self._every_s = every_s
        self._patience_s = every_s
        self._said_s = time.monotonic()
        self._stages = ""

    def is_due(self, reasons: Sequence[str]) -> bool:
        """Return whether to log `reasons` now, and if so count them as logged."""
        stages = without_elapsed("; ".join(reasons))
        is_new = stages != self._stages
        now_s = time.monotonic()
        if now_s - self._said_s <= (self._every_s if is_new else self._patience_s):
            return False
        self._patience_s = self._every_s if is_new else min(2 * self._patience_s, max(_LONGEST_S, self._every_s))
        self._said_s, self._stages = now_s, stages
        return True
