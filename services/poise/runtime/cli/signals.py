"""Stop by signal: the first finishes running work, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from poise.runtime.cli.exit_status import INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signal(finish: Callable[[], None], abandon: Callable[[], None] = lambda: None) -> Iterator[None]:
    """On the running loop, call `finish` on the first SIGINT or SIGTERM; on the second, `abandon`, and exit."""
    loop = asyncio.get_running_loop()
    signalled = False

    def on_signal() -> None:
        nonlocal signalled
        if signalled:
            abandon()
            os._exit(INTERRUPTED)
        signalled = True
        finish()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
