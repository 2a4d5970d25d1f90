"""Log repeated messages as one line with a count."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

_EVERY_S = 60.0
_MAX_KINDS = 64
"""Remembered kinds; the one logged longest ago is forgotten first."""


class RepeatLog:
    """Logs each kind of message at most once a minute, with the number of suppressed ones.

    Messages that differ only in their numbers are of one kind.
    """

    def __init__(self, logger: logging.Logger, now: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._now = now
        self._kinds: dict[str, tuple[float, int]] = {}
        """By kind: when it was last logged, and how many were suppressed since."""

    def log(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Log or count a message. The traceback of `error` is logged the first time."""
        kind, now_s = re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "#", message), self._now()
        logged_s, num_suppressed = self._kinds.pop(kind, (-_EVERY_S, 0))
        is_first = logged_s < 0 and not num_suppressed
        if now_s - logged_s < _EVERY_S:
            self._kinds[kind] = logged_s, num_suppressed + 1
            return
        again = f" ({num_suppressed} similar messages since the last one)" if num_suppressed else ""
        self._logger.log(level, "%s%s", message, again, exc_info=error if is_first else None)
        self._kinds[kind] = now_s, 0
        while len(self._kinds) > _MAX_KINDS:
            del self._kinds[next(iter(self._kinds))]
