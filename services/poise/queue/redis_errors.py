"""Translates errors of a Redis server into errors with remedies."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from redis import exceptions
from redis.exceptions import RedisError

from poise.errors import BackendDown, PoiseError, QueueFull

RETRY_AFTER_S = 1.0

_MAX_TEXT = 250
"""Characters shown of a server's error."""


class UnsuitableServerError(RedisError):
    """The server is reachable but unsuitable for the queue. `remedy` says what to change."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of error."""

    words: tuple[str, ...]
    """The error is of this kind if its text contains any of these: errors in scripts have no error code."""
    remedy: str
    types: tuple[type[BaseException], ...] = ()


_KINDS = (
    _Kind(
        ("READONLY", "read only replica", "UNBLOCKED"),
        "queue.url reaches a read-only replica. Set it to the primary, or to a name or proxy that follows a failover.",
        (exceptions.ReadOnlyError,),
    ),
    _Kind(
        ("MASTERDOWN",),
        "queue.url reaches a replica that has lost its primary. Set it to the primary.",
        (exceptions.MasterDownError,),
    ),
    _Kind(("LOADING",), "Wait until the server has loaded its data from disk.", (exceptions.BusyLoadingError,)),
    _Kind(("max number of clients",), "Raise maxclients of the server, or close other connections to it."),
    _Kind(("DENIED", "protected mode"), "The server is in protected mode. Set a password there and in queue.url."),
    _Kind(
        ("NOAUTH", "WRONGPASS", "Authentication required", "invalid password", "invalid username"),
        "Put the user and the password into queue.url: redis://user:password@host:port/0.",
        (exceptions.AuthenticationError,),
    ),
    _Kind(
        ("NOPERM", "ACL failure", "no permissions", "can't run this command", "can't access"),
        "Grant the user of queue.url the permission that the error names.",
        (exceptions.NoPermissionError,),
    ),
    _Kind(
        ("MISCONF",),
        "The server cannot write its data to disk and rejects writes. Free space on its disk and read its log.",
    ),
    _Kind(("NOREPLICAS",), "Too few replicas are in sync. Repair them, or lower min-replicas-to-write."),
    _Kind(
        ("CLUSTERDOWN", "Hash slot not served"),
        "Repair the cluster: some of its slots have no node.",
        (exceptions.ClusterDownError,),
    ),
    _Kind(
        ("MOVED",),
        "The cluster redirects to another node for the queue's slot. Check that this machine can reach that node.",
        (exceptions.MovedError,),
    ),
    _Kind(
        ("TRYAGAIN", "CROSSSLOT"),
        "Wait until the cluster has moved the queue's slot.",
        (exceptions.TryAgainError, exceptions.AskError, exceptions.ClusterCrossSlotError),
    ),
    _Kind(("WRONGTYPE",), "The key is not a stream. Set queue.stream to another name, or delete the key."),
    _Kind(
        ("exhausted the last possible ID",),
        "The ids of the stream are used up. Set queue.stream to another name, or delete the key once it is consumed.",
    ),
    _Kind(("BUSY ",), "A script blocks the server. Wait for it, or end it with SCRIPT KILL."),
    _Kind(
        ("unknown command", "SELECT is not allowed", "DB index is out of range"),
        "Use Redis 6.2 or newer, or Valkey, with all commands enabled, and a database number that exists.",
    ),
)

_UNREACHABLE = "Check that the Redis server runs and that queue.url is its address, with rediss:// only if it uses TLS."


def to_poise_error(error: Exception, address: str) -> PoiseError:
    """Return the `PoiseError`, with a remedy, for an error of the Redis client or the operating system."""
    if isinstance(error, UnsuitableServerError):
        return BackendDown(f"Redis at {address} {error}", remedy=error.remedy, retry_after_s=RETRY_AFTER_S)
    text = str(error) or type(error).__name__
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + "…"
    if isinstance(error, exceptions.OutOfMemoryError) or "OOM command not allowed" in text:
        return QueueFull(
            f"Redis at {address} is out of memory: {text}",
            remedy="Wait until the value service consumes labels, discard dead letters, or raise Redis's maxmemory.",
            retry_after_s=RETRY_AFTER_S,
        )
    return BackendDown(f"Redis at {address} failed: {text}", remedy=_remedy(error, text), retry_after_s=RETRY_AFTER_S)


def reconnect_may_help(error: Exception) -> bool:
    """Whether a new connection may succeed, because the peer died or became a replica."""
    if isinstance(error, exceptions.AuthenticationError | exceptions.BusyLoadingError | UnsuitableServerError):
        return False
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError | OSError | exceptions.ReadOnlyError):
        return True
    return any(words in str(error) for words in ("READONLY", "UNBLOCKED", "MASTERDOWN"))


def _remedy(error: Exception, text: str) -> str:
    for kind in _KINDS:
        if isinstance(error, kind.types) or any(words in text for words in kind.words):
            return kind.remedy
    if isinstance(error, ssl.SSLError) or "SSL" in text or "certificate" in text.lower():
        return "Check that the server uses TLS on this port (rediss://) and that this machine trusts its certificate."
    return _UNREACHABLE
