"""Where the processes of a run listen on this machine: its ports, and the Valkey's socket."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import tempfile
from pathlib import Path

from poise.runtime.config import AdminConfig, ConfigError, GrpcConfig
from poise.runtime.files import write_file

SERVICES = ("generation", "value", "learner")

_PORT_NAMES = tuple(f"{service}.{kind}" for service in SERVICES for kind in ("grpc", "admin"))


def address(listening: GrpcConfig | AdminConfig) -> str:
    """Return host:port where this machine reaches what listens there."""
    host = "127.0.0.1" if listening.host == "0.0.0.0" else listening.host  # noqa: S104 (compared, not bound)
    return f"{host}:{listening.port}"


def run_ports(folder: Path) -> dict[str, int]:
    """Return the run's ports: chosen once, so that a restarted process is found where it was.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = folder / "services" / "ports.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once agree
            return _read_ports(path) or _choose_ports(path)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be used: {error}") from error


def free_ports(num: int) -> list[int]:
    """Return distinct ports of this machine that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]  # all at once: none is chosen twice
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _read_ports(path: Path) -> dict[str, int] | None:
    if not path.exists():
        return None
    try:
        ports: dict[str, int] = json.loads(path.read_text())
    except ValueError:
        return None
    return ports if isinstance(ports, dict) and ports.keys() == set(_PORT_NAMES) else None


def _choose_ports(path: Path) -> dict[str, int]:
    ports = dict(zip(_PORT_NAMES, free_ports(len(_PORT_NAMES)), strict=True))
    write_file(path, json.dumps(ports).encode())
    return ports


def socket_path(folder: Path) -> Path:
    """Return where the Valkey's socket goes: a path within a socket's limit of about 100 characters."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"poise-{os.getuid()}-{name}" / "valkey.sock"
