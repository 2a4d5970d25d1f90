"""Tokens and certificates of a local run, for its services and their callers.

A run has its own bearer token, which keeps out other users of the machine. Every caller uses one token and one CA file
for all services that it calls.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.local.addresses import private_folder
from poise.runtime.config.settings import AuthConfig, ConfigError, ServiceConfig, open_token_file

_NUM_BYTES = 32


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller needs for a set of services."""

    token_file: Path | None
    """File with a token that all of them accept; None if there is no such token, or none is needed."""
    ca_file: Path | None
    """Certificate that all of them present; None if their certificates differ, or they do not use TLS."""
    token_reason: str
    """Why a token file is required; empty if it is not."""
    ca_reason: str
    """Why a CA file is required; empty if it is not."""

    def settings(self, prefix: str = "") -> dict[str, str]:
        """Return the known settings of a caller, with `prefix` before their names."""
        files = {"token_file": self.token_file, "ca_file": self.ca_file}
        return {f"{prefix}{name}": str(file) for name, file in files.items() if file is not None}

    def missing(self, prefix: str, token_file: Path | None, ca_file: Path | None) -> Iterator[str]:
        """Yield a problem for each required file that a caller lacks. `prefix` precedes the setting's name."""
        if self.token_reason and token_file is None:
            yield f"{prefix}token_file: required: {self.token_reason}"
        if self.ca_reason and ca_file is None:
            yield f"{prefix}ca_file: required: {self.ca_reason}"


def common_credentials(services: Mapping[str, ServiceConfig]) -> Credentials:
    """Return the credentials of one caller of all these services.

    Raises:
        ConfigError: a token file cannot be read.
    """
    token_file, token_reason = _common_token(services)
    ca_file, ca_reason = _common_certificate(services)
    return Credentials(token_file, ca_file, token_reason, ca_reason)


def _common_token(services: Mapping[str, ServiceConfig]) -> tuple[Path | None, str]:
    auths = {name: service.auth for name, service in services.items()}
    protected = {name: auth for name, auth in auths.items() if auth.token is not None or auth.token_file is not None}
    if not protected:
        return None, ""
    names = " and ".join(protected)
    files = [auth.token_file for auth in protected.values() if auth.token_file is not None]
    if not files:
        return None, f"{names} got a token from the environment. Write it to a file and set auth.token_file to its path"
    is_one_file = len(files) == len(protected) and len(set(files)) == 1
    if not is_one_file and len({auth.read_token() for auth in protected.values()}) > 1:
        return None, f"{names} have different tokens, but a caller sends one token to all. Set the same token for all"
    return files[0], f"{names} require a token"


def _common_certificate(services: Mapping[str, ServiceConfig]) -> tuple[Path | None, str]:
    chains = {name: service.grpc.tls_cert_file for name, service in services.items()}
    secure = [name for name, chain in chains.items() if chain is not None]
    if not secure:
        return None, ""
    if len(secure) < len(chains):
        plain = " and ".join(name for name in chains if name not in secure)
        return None, f"TLS is on for {' and '.join(secure)} and off for {plain}. Turn it on or off for all of them"
    if len({*chains.values()}) > 1:
        return None, "the services present different certificates. Name a file with the CAs that signed them"
    return next(iter(chains.values())), "the services use TLS"


def missing_tokens(auths: Mapping[str, AuthConfig], folder: Path) -> dict[str, dict[str, Any]]:
    """Return settings with a token file for each service without a token, by service.

    The file is that of another service, or else the run's own. A token from the environment is never written to a file.
    Raises the errors of `run_token_file`.
    """
    unprotected = [
        name
        for name, auth in auths.items()
        if auth.token is None and auth.token_file is None and not auth.allow_open_bind
    ]
    files = [auth.token_file for auth in auths.values() if auth.token_file is not None]
    if not unprotected or (not files and any(auth.token is not None for auth in auths.values())):
        return {}
    token_file = files[0] if files else run_token_file(folder)
    return {name: {"auth": {"token_file": str(token_file)}} for name in unprotected}


def run_token_file(folder: Path) -> Path:
    """Return the file with the run's own token; create it if it does not exist.

    Raises:
        ConfigError: the folder cannot be written, or other users can read the file.
    """
    path = private_folder(folder) / "token"
    try:
        if not path.exists():
            _create_token(path)
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be used: {error}") from error
    open_token_file(path, "auth.token_file")
    return path


def _create_token(path: Path) -> None:
    """Create the file atomically. If two processes do so at once, the first one wins."""
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
