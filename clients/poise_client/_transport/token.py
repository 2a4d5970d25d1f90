"""Bearer tokens in files: read again when they change, rejected if other users can read them."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

TOKEN_FILE_ENV = "POISE_TOKEN_FILE"  # noqa: S105 (a variable's name)
"""Environment variable with the token file of clients without `token` and `token_file`."""

ROTATION_S = 120.0
"""Seconds after a change during which both tokens are valid. Kubernetes updates mounts within a minute."""

_TOKEN = re.compile(r"[!-~]+")


class TokenFile:
    """A file with a bearer token on one line."""

    def __init__(self, path: Path | str, now: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            OSError: it cannot be read.
            ValueError: other users can read or write it, or it contains no token.
        """
        self.path = Path(path)
        self._now = now
        self._version = self._file_version()
        self._token = self._read()
        self._previous: str | None = None
        self._changed_s = -ROTATION_S
        self.problem = ""
        """Why the last change of the file was rejected; empty while the file is valid."""

    @property
    def current(self) -> str:
        """The token in the file; the previous one while the file is invalid."""
        try:
            version = self._file_version()
            if version != self._version:
                token = self._read()
                if token != self._token:
                    self._previous, self._token, self._changed_s = self._token, token, self._now()
                self._version = version
            self.problem = ""
        except (OSError, ValueError) as error:
            self.problem = str(error)
        return self._token

    @property
    def accepted(self) -> tuple[str, ...]:
        """The current token and, for `ROTATION_S` after a change, the previous one."""
        current = self.current
        return (current, self._previous) if self.changed_lately and self._previous is not None else (current,)

    @property
    def changed_lately(self) -> bool:
        """Whether the token changed so recently that the peer may still use the old one."""
        return self._now() - self._changed_s < ROTATION_S

    def _file_version(self) -> tuple[int, ...]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size, status.st_mode

    def _read(self) -> str:
        with self.path.open("rb") as file:
            reject_shared_file(self.path, os.fstat(file.fileno()))
            token = file.read(65536).decode("ascii", "replace").strip()
        try:
            check_token(token)
        except ValueError as error:
            raise ValueError(f"the token in {self.path} {error}") from None
        return token


def check_token(token: str) -> None:
    """Raise `ValueError` for a string that cannot be sent as a bearer token."""
    if not _TOKEN.fullmatch(token):
        raise ValueError("must be one or more printable ASCII characters, without spaces or line breaks")


def reject_shared_file(path: Path, status: os.stat_result) -> None:
    """Raise `ValueError` for a secret that other users of the machine can read or change.

    A root-owned file that only a group of this process can read is accepted: Kubernetes creates such with `fsGroup`.
    """
    if os.name != "posix" or not status.st_mode & 0o077:
        return
    is_mounted_secret = (
        status.st_uid == 0 and not status.st_mode & 0o037 and status.st_gid in {os.getegid(), *os.getgroups()}
    )
    if not is_mounted_secret:
        raise ValueError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}: other users can use the token. "
            f"Run `chmod 600 {path}`; in Kubernetes, set defaultMode: 0440 of the volume and fsGroup of the pod"
        )
