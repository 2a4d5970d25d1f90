"""Check the length of Unix socket paths, which a long TMPDIR exceeds."""

from __future__ import annotations

import os
from pathlib import Path

from poise.runtime.config.settings import ConfigError

MAX_PATH_BYTES = 107
"""Size of `sun_path` on Linux without its final zero byte."""


def check_socket_path(path: Path, variable: str) -> None:
    """Raise `ConfigError` if a socket's path, in the folder that a variable names, is too long."""
    if (length := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise ConfigError(
            f"{variable}: the Unix socket path {path} has {length} bytes; the limit is {MAX_PATH_BYTES}. Set "
            f"{variable} to a shorter folder, such as /tmp"
        )
