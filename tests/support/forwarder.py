"""A TCP forwarder whose connections can die without a word: bytes are dropped, and nothing is closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from poise.runtime.network.addresses import join_address


class Forwarder:
    """Forwards what it accepts to `target`, which is host:port."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._upstream = (host.strip("[]"), int(port))
        self._dead: list[asyncio.Event] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    @property
    def num_connections(self) -> int:
        return len(self._dead)

    def go_silent(self) -> None:
        """Drop every byte of the connections that there are; those made later pass."""
        for dead in self._dead:
            dead.set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dead = asyncio.Event()
        self._dead.append(dead)
        self._writers.append(writer)
        task = asyncio.create_task(self._forward(reader, writer, dead))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dead: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
            self._writers.append(upstream_writer)
            await asyncio.gather(_pump(reader, upstream_writer, dead), _pump(upstream_reader, writer, dead))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dead: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            if not dead.is_set():
                writer.write(data)
                await writer.drain()
        if not dead.is_set():
            writer.close()


@contextlib.asynccontextmanager
async def forwarding(target: str, host: str = "127.0.0.1") -> AsyncIterator[Forwarder]:
    """Run a forwarder to a server, which listens on `host`."""
    forwarder = Forwarder(target)
    server = await asyncio.start_server(forwarder.accept, host, 0)
    forwarder.address = join_address(host, server.sockets[0].getsockname()[1])
    try:
        yield forwarder
    finally:
        server.close()
        await forwarder.close()
