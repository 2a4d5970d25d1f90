"""The embedded Valkey: durable, and accessible only to this user."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis.asyncio

from poise.local.processes.process import ProcessSpec
from poise.local.processes.supervisor import Supervisor
from poise.local.processes.valkey import valkey_command
from poise.runtime.config.settings import ConfigError

DEADLINE_S = 120.0


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="poise-") as folder:
        yield Path(folder) / "own" / "valkey.sock"


async def connected(socket: Path) -> redis.asyncio.Redis:
    """Return a client once the server has read what it had kept."""
    client = redis.asyncio.Redis(unix_socket_path=str(socket))
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            await client.ping()
            return client
        except redis.RedisError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_written_data_survives_a_kill(tmp_path: Path, socket: Path) -> None:
    spec = ProcessSpec("valkey", valkey_command(socket, tmp_path / "data"), tmp_path / "valkey.log")
    async with Supervisor(tmp_path / "services") as supervisor:
        await supervisor.start([spec])
        client = await connected(socket)
        async with client:
            for number in range(20):
                await client.xadd("labels", {"number": number})
            pid = (await client.info("server"))["process_id"]
        os.kill(pid, signal.SIGKILL)
        client = await connected(socket)
        async with client:
            assert (await client.info("server"))["process_id"] != pid
            assert await client.xlen("labels") == 20
            assert (await client.config_get("appendfsync"))["appendfsync"] == "always"
            assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
            assert (await client.config_get("port"))["port"] == "0"
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_folder_open_to_others_is_rejected(tmp_path: Path, socket: Path, mode: int) -> None:
    socket.parent.mkdir()
    socket.parent.chmod(mode)
    with pytest.raises(ConfigError, match=r"must be accessible only to this user\. Remove it"):
        valkey_command(socket, tmp_path)


def test_link_to_another_folder_is_rejected(tmp_path: Path, socket: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    socket.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="must be accessible only to this user"):
        valkey_command(socket, tmp_path)
