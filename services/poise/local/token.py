"""The bearer token of a local run, which keeps other users of the machine from its services."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poise.local.addresses import private_folder
from poise.runtime.config.settings import AuthConfig, ConfigError, open_token_file

_NUM_BYTES = 32


def run_token_file(folder: Path) -> Path:
    """Return the file with the run's own token, made once.

    Raises:
        ConfigError: the folder cannot be written, or others can read the file.
    """
    path = private_folder(folder) / "token"
    try:
        _make(path)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be used: {error}") from error
    open_token_file(path, "auth.token_file")
    return path


def _make(path: Path) -> None:
    """Make the file whole or not at all; of two that try at once the first one wins."""
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(_NUM_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def missing_tokens(auths: Mapping[str, AuthConfig], folder: Path) -> dict[str, dict[str, Any]]:
    """Return, by service, the settings that give a token to services without one.

    It is the one that the user gave to another service by file, else the run's own. A token that the environment gives
    to one service is not written down for others. Raises as `run_token_file`.
    """
    open_ones = [name for name, auth in auths.items() if auth.token is None and auth.token_file is None]
    open_ones = [name for name in open_ones if not auths[name].allow_open_bind]
    files = [auth.token_file for auth in auths.values() if auth.token_file is not None]
    if not open_ones or (not files and any(auth.token is not None for auth in auths.values())):
        return {}
    token_file = files[0] if files else run_token_file(folder)
    return {name: {"auth": {"token_file": str(token_file)}} for name in open_ones}
