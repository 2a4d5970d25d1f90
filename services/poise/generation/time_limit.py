"""A limit that ends Python code on another thread: by time, by the text it makes, or when told.

A chat template is a program that came with the model; a thread that runs one cannot be killed. So it is traced, and an
exception is raised in it at its next line. Code that is not Python's, such as a tokenizer's, is bounded by its input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN_S = 0.1
"""Code that goes on although it was ended is ended again after so long."""

_TEMPLATE_FILE, _TEMPLATE_MODULE = "<template>", "jinja2.runtime"
"""Of the code that jinja makes of a template, and calls from it."""


class LimitReached(Exception):
    """The code was ended; the text says why."""


class TimeLimit:
    """Bounds what several pieces of code may take together."""

    def __init__(self, total_s: float) -> None:
        self._total_s = total_s
        self._end_s = time.monotonic() + total_s
        self._is_cancelled = False

    def cancel(self) -> None:
        """End the code that runs now, and all that is to follow. For another thread to call."""
        self._is_cancelled = True

    def check(self) -> None:
        """Raise `LimitReached` when nothing more may run."""
        if self._is_cancelled:
            raise LimitReached("it is not wanted any more")
        if time.monotonic() > self._end_s:
            raise LimitReached(f"all of them took more than {self._total_s:g} s")

    @contextmanager
    def bounded(self, each_s: float, max_chars: int) -> Iterator[None]:
        """Raise `LimitReached` in this thread's Python code after so long, or once its templates made so much text."""
        self.check()
        watch = _Watch(self, each_s, max_chars)
        before = sys.gettrace()
        sys.settrace(watch.trace)
        try:
            yield
        finally:
            sys.settrace(before)


class _Watch:
    def __init__(self, limit: TimeLimit, each_s: float, max_chars: int) -> None:
        self._limit = limit
        self._each_s = each_s
        self._end_s = time.monotonic() + each_s
        self._max_chars = max_chars
        self._num_chars = 0

    def trace(self, frame: FrameType, event: str, returned: Any) -> Any:
        """See `sys.settrace`. A template yields, and its macros return, the text that they make."""
        if event == "return" and isinstance(returned, str) and _is_of_template(frame):
            self._num_chars += len(returned)
            if self._num_chars > self._max_chars:
                self._max_chars += self._num_chars
                raise LimitReached(f"it makes more than {self._num_chars} characters")
        elif event == "line":
            self._limit.check()
            if time.monotonic() > self._end_s:
                self._end_s = time.monotonic() + _AGAIN_S
                raise LimitReached(f"it takes more than {self._each_s:g} s")
        return self.trace


def _is_of_template(frame: FrameType) -> bool:
    return frame.f_code.co_filename == _TEMPLATE_FILE or frame.f_globals.get("__name__") == _TEMPLATE_MODULE
