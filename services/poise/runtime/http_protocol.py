"""uvicorn's HTTP protocol with deadlines: for the head of a request, for a client that does not read, and in number.

uvicorn itself waits for a request's head, and for its answer to be read, for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
"""From connecting, or from the answer before, to the end of a request's head."""
READ_TIMEOUT_S = 30.0
"""How long a client may leave an answer unread."""
MAX_CONNECTIONS = 256
"""Beyond it, the connection that has waited longest for a request gives way, so that probes always get in."""
MAX_HEAD_BYTES = 16 * 2**10
"""Largest head of a request."""


class DeadlineProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._displace()
        self._start_clock(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_clock()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stop the clock once a request's head has come."""
        super().handle_events()
        if self.is_answering:
            self._stop_clock()

    def on_response_complete(self) -> None:
        """Start it again. What is left of a body that was refused is read in that time, and dropped."""
        super().on_response_complete()
        if not self.is_answering:
            self._start_clock(HEAD_TIMEOUT_S)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._start_clock(READ_TIMEOUT_S)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._stop_clock()

    @property
    def is_answering(self) -> bool:
        """Whether a request has come that is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _displace(self) -> None:
        waiting = [one for one in self.connections if isinstance(one, DeadlineProtocol) and one._deadline is not None]
        longest = min(waiting, key=lambda one: one._deadline.when() if one._deadline else 0.0, default=self)
        longest.transport.abort()

    def _start_clock(self, timeout_s: float) -> None:
        self._stop_clock()
        if not self.transport.is_closing():
            self._deadline = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
