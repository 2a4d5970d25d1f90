"""Rejects the use of gRPC in forked processes, where it does not work.

Importing this module loads gRPC without its own fork handlers. With them, about a quarter of the children forked during
a call crash. `GRPC_ENABLE_FORK_SUPPORT` in the environment still turns them on.
"""

from __future__ import annotations

import os

_FORK_SUPPORT_ENV = "GRPC_ENABLE_FORK_SUPPORT"


def _load_grpc() -> None:
    """Import gRPC, which reads the variable once, and restore the environment."""
    is_set = _FORK_SUPPORT_ENV in os.environ
    os.environ.setdefault(_FORK_SUPPORT_ENV, "0")
    try:
        import grpc  # noqa: F401 (loads the library)
    finally:
        if not is_set:
            del os.environ[_FORK_SUPPORT_ENV]


_load_grpc()

_opened_by: int | None = None
"""Id of the process that opened the first channel: this process or an ancestor."""


def is_forked() -> bool:
    """Return whether this process was forked from one that has used gRPC. Calls would hang or crash here."""
    return _opened_by not in (None, os.getpid())


def reject_after_fork() -> None:
    """Raise `RuntimeError` if `is_forked`."""
    if is_forked():
        raise RuntimeError(
            f"process {os.getpid()} was forked after process {_opened_by} had used gRPC, which does not work across a "
            'fork. Start children with multiprocessing.get_context("spawn") or "forkserver", or fork before the first '
            "call of any client"
        )


def record_use() -> None:
    """Record that this process uses gRPC. Raises `RuntimeError` if `is_forked`."""
    global _opened_by
    reject_after_fork()
    _opened_by = os.getpid()
