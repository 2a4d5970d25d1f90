"""Errors that end a run."""

from __future__ import annotations

import errno

_PERMANENT = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG})
"""File errors that a restart does not fix, unlike a full or missing disk."""


class RunError(Exception):
    """The run cannot continue. The message has the cause and the remedy."""


class SettingsError(RunError):
    """Settings, data, run folder and services are inconsistent. A restart does not help."""


def file_error_kind(cause: Exception) -> type[RunError]:
    """Return the error to raise for an unusable file: `SettingsError` if a restart would fail in the same way."""
    is_transient = isinstance(cause, OSError) and cause.errno not in _PERMANENT
    return RunError if is_transient else SettingsError
