"""Rejects the use of gRPC in forked processes, where it does not work.

Importing this module loads gRPC without its own fork handlers: with them, about one in four children that are forked
during a call crashes. `GRPC_ENABLE_FORK_SUPPORT` in the environment still turns them on.
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
"""The process that opened the first channel: this one, or one that it was forked from."""


def is_forked() -> bool:
    """Return whether this process was forked from one that has used gRPC. Calls would hang or crash here."""
    return _opened_by not in (None, os.getpid())


def refuse_after_fork() -> None:
    """Raise `RuntimeError` if `is_forked`."""
    if is_forked():
        raise RuntimeError(
            f"process {os.getpid()} was forked after process {_opened_by} had used gRPC, which does not work across a "
            'fork. Start children with multiprocessing.get_context("spawn") or "forkserver", or fork before the first '
            "call of any client"
        )


def note_use() -> None:
    """Record that this process uses gRPC. Raises `RuntimeError` if `is_forked`."""
    global _opened_by
    refuse_after_fork()
    _opened_by = os.getpid()
