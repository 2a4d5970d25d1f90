"""What ends a run."""

from __future__ import annotations

import errno

_STAYS_UNUSABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG})
"""What another start does not change, unlike a full or absent disk."""


class RunError(Exception):
    """The run cannot go on as asked. The message says why and what to do."""


class SettingsError(RunError):
    """The settings, data, run folder and services do not fit together: starting again does not help."""


def kind_of_error(cause: Exception) -> type[RunError]:
    """Return the error to raise for a file that cannot be used: `SettingsError` if another start fails alike."""
    may_pass = isinstance(cause, OSError) and cause.errno not in _STAYS_UNUSABLE
    return RunError if may_pass else SettingsError
