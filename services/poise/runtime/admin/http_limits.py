"""uvicorn's HTTP protocol with limits for slow clients and for the number of connections, which uvicorn lacks."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
"""Time from the connection, or the previous response, to the end of a request's head."""
READ_TIMEOUT_S = 30.0
"""Time that a client may leave a response unread."""
MAX_CONNECTIONS = 256
"""With more, the connection with the nearest deadline is closed, so that health probes always get through."""
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
            self._close_one()
        self._restart_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_clock()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stop the clock once a request's head is complete."""
        super().handle_events()
        if self.is_answering and not self.flow.write_paused:
            self._stop_clock()

    def on_response_complete(self) -> None:
        """Restart the clock. The rest of a rejected body is read in that time and dropped."""
        super().on_response_complete()
        self._restart_clock()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._restart_clock()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._restart_clock()

    @property
    def is_answering(self) -> bool:
        """Whether a request has no complete response yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _close_one(self) -> None:
        idle = [one for one in self.connections if isinstance(one, DeadlineProtocol) and one._deadline is not None]
        nearest = min(idle, key=lambda one: one._deadline.when() if one._deadline else 0.0, default=self)
        nearest.transport.abort()

    def _restart_clock(self) -> None:
        """Set the deadline for the client's next action; none while the service works."""
        self._stop_clock()
        if self.flow.write_paused or self.transport.is_closing():  # closing completes once the response is read
            self._deadline = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)
        elif not self.is_answering:
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
