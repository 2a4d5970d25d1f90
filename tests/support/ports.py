"""Ports for programs that a test starts."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, LAST = 10_000, 32_000
"""Below the ports that the kernel hands out, so that no connection takes one before the test's program listens."""

_candidates = itertools.count(os.getpid() * 97)
"""Another place for every process: workers that run side by side seldom look at the same port."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on; never the same one twice."""
    for candidate in _candidates:
        port = FIRST + candidate % (LAST - FIRST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: the candidates never end")
