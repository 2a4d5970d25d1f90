"""Connections to the Redis server. Each is checked before first use and replaced when it fails.

Follows a failover to the new primary and a cluster's redirection to another node.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MovedError, RedisError, ResponseError

from poise.errors import QueueFull
from poise.queue.redis_errors import reconnect_may_help, to_poise_error
from poise.queue.redis_server import ServerReport, examine, is_cluster, parse_info
from poise.runtime.network.addresses import join_address

T = TypeVar("T")

Client = redis.asyncio.Redis

SendCommand = Callable[..., Awaitable[Any]]
"""Sends one command, split into words, and returns the reply."""

_CONNECT_TIMEOUT_S = 2.0
_REPLY_TIMEOUT_S = 10.0
_IDLE_CHECK_S = 15
"""A connection that was idle for longer gets a PING before use."""
_EXAMINE_EVERY_S = 30.0
"""How often an open connection is checked again, because settings of a server may change."""
_MAX_TRIES = 3
_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class RedisClient:
    """Runs commands on the server of the URL, or on the cluster node that it redirects to."""

    def __init__(
        self,
        url: str,
        *,
        needed_bytes: int,
        examine_keys: Callable[[SendCommand, bool], Awaitable[None]],
        failed: Callable[[], None],
    ) -> None:
        """Prepare; no I/O.

        Args:
            url: `redis://[user:password@]host:port/db`, `rediss://…` or `unix://path`.
            needed_bytes: memory that the queue may need in the server.
            examine_keys: called for each new connection and every 30 s. The flag is true for a cluster node.
            failed: called when a connection fails. A response may be lost.
        """
        self._url = url
        self._needed_bytes = needed_bytes
        self._examine_keys = examine_keys
        self._failed = failed
        parts = urlsplit(url)
        self._home = join_address(parts.hostname, parts.port or 6379) if parts.hostname else parts.path
        self.address = self._home
        """host:port, or path, of the current server."""
        self.report = ServerReport(None, ())
        """Result of the last check of a connection."""
        self._examined_s = -_EXAMINE_EVERY_S
        self._client = self._make(None)

    def _make(self, node: tuple[str, int] | None) -> Client:
        is_tcp = not self._url.startswith("unix:")
        pool = redis.asyncio.ConnectionPool.from_url(
            self._url,
            protocol=2,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            socket_timeout=_REPLY_TIMEOUT_S,
            health_check_interval=_IDLE_CHECK_S,
            retry=Retry(NoBackoff(), 0),  # `call` retries over a checked connection
            redis_connect_func=self._on_connect,
            **({"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE} if is_tcp else {}),
        )
        if node is not None:
            pool.connection_kwargs |= {"host": node[0], "port": node[1]}
        return redis.asyncio.Redis.from_pool(pool)

    async def call(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """Run `work`; retry it over a new connection if the old one is dead or reaches a replica.

        Raises:
            BackendDown, QueueFull: the translated error, with a remedy.
        """
        for num_left in reversed(range(_MAX_TRIES)):
            client = self._client
            try:
                await self._examine_if_due(client)
                return await work(client)
            except (RedisError, OSError) as error:
                shown = to_poise_error(error, self.address)
                if isinstance(shown, QueueFull):
                    raise shown from error
                self._failed()
                node = None
                if isinstance(error, MovedError):  # without a host, the node is on the same host
                    node = error.host or client.connection_pool.connection_kwargs["host"], error.port
                await self._replace(client, node)
                if not num_left or not (node or reconnect_may_help(error)):
                    raise shown from error
        raise AssertionError("unreachable: the last try returns or raises")

    async def _replace(self, failed: Client, node: tuple[str, int] | None) -> None:
        """Replace the connections: connect to `node`, or resolve the address of the URL again."""
        if self._client is not failed:
            return  # another call has replaced it
        self._client = self._make(node)
        self._examined_s = -_EXAMINE_EVERY_S
        self.address = join_address(*node) if node else self._home
        with contextlib.suppress(RedisError, OSError):
            await failed.aclose()

    async def _on_connect(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await self._examine(connection)

    async def _examine_if_due(self, client: Client) -> None:
        if not self._is_due():
            return
        connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]  # has no annotations
        try:
            if self._is_due():  # a new connection was checked when it was made
                await self._examine(connection)
        finally:
            await client.connection_pool.release(connection)

    def _is_due(self) -> bool:
        return asyncio.get_running_loop().time() - self._examined_s >= _EXAMINE_EVERY_S

    async def _examine(self, connection: AbstractConnection) -> None:
        """Check the server and the keys. Raises `UnsuitableServerError`, or the server's own error."""

        async def send(*command: Any) -> Any:
            await connection.send_command(*command)
            return await connection.read_response()

        async def send_if_allowed(*command: str) -> Any:
            try:
                return await send(*command)
            except ResponseError:
                return None

        info = parse_info((await send_if_allowed("INFO") or b"").decode(errors="replace"))
        settings = {}
        for name in ("save", "appendfsync"):
            if pair := await send_if_allowed("CONFIG", "GET", name):
                settings[name] = pair[1].decode()
        report = examine(info, settings, self._needed_bytes)
        await self._examine_keys(send, is_cluster(info))
        self.report, self._examined_s = report, asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
