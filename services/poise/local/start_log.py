"""When to say what is waited for while services start: when it has changed, and the same again ever more rarely."""

from __future__ import annotations

import time
from collections.abc import Sequence

from poise.runtime.startup import without_elapsed

_LONGEST_S = 120.0


class StartLog:
    """The messages of one wait."""

    def __init__(self, every_s: float) -> None:
        """Say nothing for the first `every_s`, nor more often."""
        self._every_s = every_s
        self._patience_s = every_s
        self._said_s = time.monotonic()
        self._stages = ""

    def is_due(self, reasons: Sequence[str]) -> bool:
        """Whether to say now why the services are waited for; if so, it counts as said."""
        stages = without_elapsed("; ".join(reasons))
        is_new = stages != self._stages
        now_s = time.monotonic()
        if now_s - self._said_s <= (self._every_s if is_new else self._patience_s):
            return False
        self._patience_s = self._every_s if is_new else min(2 * self._patience_s, max(_LONGEST_S, self._every_s))
        self._said_s, self._stages = now_s, stages
        return True
