"""Unix sockets: their paths have a limit, which a long TMPDIR exceeds."""

from __future__ import annotations

import os
from pathlib import Path

from poise.runtime.config.settings import ConfigError

MAX_PATH_BYTES = 107
"""Of `sun_path` on Linux, less the byte that ends it."""


def check_socket_path(path: Path, variable: str) -> None:
    """Raise `ConfigError` for a socket whose path is too long, because of the folder that a variable names."""
    if (length := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise ConfigError(
            f"{variable}: {path} is too long for a Unix socket: {length} bytes, at most {MAX_PATH_BYTES}; set "
            f"{variable} to a shorter folder, such as /tmp"
        )
