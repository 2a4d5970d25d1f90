"""Addresses of a run's processes on this machine: ports, and the socket of the embedded Valkey."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from poise.runtime.config.settings import AdminConfig, ConfigError, GrpcConfig
from poise.runtime.files.atomic import write_file
from poise.runtime.network.addresses import join_address, reachable_host

logger = logging.getLogger(__name__)

SERVICES = ("generation", "value", "learner")

_PORT_NAMES = tuple(f"{service}.{kind}" for service in SERVICES for kind in ("grpc", "admin"))


def address(listening: GrpcConfig | AdminConfig) -> str:
    """Return host:port at which this machine reaches a listener."""
    return join_address(reachable_host(listening.host), listening.port)


def run_ports(folder: Path) -> dict[str, int]:
    """Return the run's ports, by `service.kind`. A run keeps its ports, so a restarted process has the same address.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with _ports_file(folder) as path:
        ports = _read_ports(path)
        if ports is None:
            ports = _choose_ports({})
            write_file(path, json.dumps(ports).encode())
        return ports


def renew_taken_ports(folder: Path) -> bool:
    """Replace ports of the run that another program has taken; return whether there were any.

    Call it while no process of the run is running. Raises the errors of `run_ports`.
    """
    with _ports_file(folder) as path:
        before = _read_ports(path) or {}
        ports = _choose_ports(before)
        if ports == before:
            return False
        write_file(path, json.dumps(ports).encode())
    for name in before:
        if ports[name] != before[name]:
            logger.warning("port %d of %s is taken by another program; using %d", before[name], name, ports[name])
    return True


@contextlib.contextmanager
def _ports_file(folder: Path) -> Iterator[Path]:
    """Lock the ports file, so that concurrent commands agree, and yield its path."""
    path = private_folder(folder) / "ports.json"
    try:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.fchmod(lock.fileno(), 0o600)
            yield path
            path.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be used: {error}") from error


def private_folder(folder: Path) -> Path:
    """Return the folder of a run's services, which only this user can enter. Create it and the run's folder if missing.

    Raises:
        ConfigError: it cannot be created, or belongs to another user.
    """
    services = folder / "services"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        services.mkdir(mode=0o700, exist_ok=True)
        facts = services.stat()
        if facts.st_uid != os.getuid():
            raise ConfigError(f"run.dir: {services} belongs to another user. Choose another folder")
        if facts.st_mode & 0o077:
            services.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be used: {error}") from error
    return services


def free_ports(num: int) -> list[int]:
    """Return distinct free ports of this machine."""
    listeners = [
        socket.create_server(("127.0.0.1", 0)) for _ in range(num)
    ]  # open together, so that no port is chosen twice
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


def _choose_ports(wanted: Mapping[str, int]) -> dict[str, int]:
    """Return a free port for each name: the wanted one if it is free. Raises `OSError`."""
    with contextlib.ExitStack() as stack:
        listening = {}  # open together, so that no port is chosen twice
        for name, port in wanted.items():
            with contextlib.suppress(OSError):
                listening[name] = stack.enter_context(socket.create_server(("127.0.0.1", port)))
        for name in _PORT_NAMES:
            if name not in listening:
                listening[name] = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return {name: listening[name].getsockname()[1] for name in _PORT_NAMES}


def socket_path(folder: Path) -> Path:
    """Return the path of the Valkey's socket, within the limit of about 100 characters."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"poise-{os.getuid()}-{name}" / "valkey.sock"
