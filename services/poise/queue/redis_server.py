"""Checks from INFO and CONFIG whether a Redis server suits the queue. Opens no connection.

A server that loses labels in normal operation is rejected. A server that may lose them in a crash gets a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from poise.queue.redis_errors import UnsuitableServerError

OLDEST_VERSION = (6, 2)
"""The first version with XAUTOCLAIM, which claims the entries of a dead consumer."""

_HEADROOM = 1.25
"""Required memory of the server / memory of the entries."""

Info = Mapping[str, str]
"""The fields of INFO."""


@dataclass(frozen=True, slots=True)
class ServerReport:
    """Shortcomings of a server that can still be used."""

    publish_error: UnsuitableServerError | None
    """Why no label may be published to the server; None if it may. Labels in the queue can still be consumed."""
    warnings: tuple[str, ...]
    """Each continues a sentence that begins with the server's name, and has no full stop."""


def parse_info(text: str) -> dict[str, str]:
    """Return the fields of the reply to INFO."""
    lines = (line.partition(":") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: value.strip() for name, _, value in lines}


def examine(info: Info, config: Mapping[str, str], needed_bytes: int) -> ServerReport:
    """Return the shortcomings of a server.

    Args:
        info: the fields of INFO; empty without the permission to read it.
        config: `save` and `appendfsync` from CONFIG GET, as far as permitted.
        needed_bytes: memory of the full queue and its dead letters.

    Raises:
        UnsuitableServerError: the server cannot be used.
    """
    if not info:
        return ServerReport(None, ("denies INFO, so its version, eviction policy and persistence cannot be checked",))
    _check_kind(info)
    warnings = [*_memory_warnings(info, needed_bytes), *_persistence_warnings(info, config)]
    return ServerReport(_eviction_error(info), tuple(warnings))


def is_cluster(info: Info) -> bool:
    """Whether the server is a node of a Redis cluster."""
    return info.get("cluster_enabled") == "1"


def _check_kind(info: Info) -> None:
    if info.get("redis_mode") == "sentinel":
        raise UnsuitableServerError(
            "is a Sentinel, which stores no data", "Set queue.url to the primary, or to a DNS name that follows it."
        )
    version = info.get("redis_version", "")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers and numbers < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UnsuitableServerError(
            f"has version {version}; the queue needs {oldest} or newer", f"Use Redis {oldest} or newer, or Valkey."
        )
    if info.get("loading") == "1":
        left = info.get("loading_eta_seconds", "")
        raise UnsuitableServerError(
            f"is loading its data from disk{f', {left} s left' if left else ''}", "Wait until it has finished."
        )
    if info.get("role") == "slave":
        primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        raise UnsuitableServerError(
            f"is a read-only replica of {primary}",
            f"Set queue.url to the primary, {primary}, or to a DNS name or proxy that follows a failover.",
        )


def _eviction_error(info: Info) -> UnsuitableServerError | None:
    policy, limit = info.get("maxmemory_policy", ""), _bytes(info, "maxmemory")
    if not policy.startswith("allkeys-") or not limit:
        return None
    return UnsuitableServerError(
        f"evicts any key when memory is short (maxmemory-policy {policy}, maxmemory {limit} bytes): "
        "published labels would be lost",
        "Set maxmemory-policy to noeviction, or use a separate server for the queue.",
    )


def _memory_warnings(info: Info, needed_bytes: int) -> list[str]:
    policy, limit = info.get("maxmemory_policy", ""), _bytes(info, "maxmemory")
    warnings = []
    if policy.startswith("allkeys-") and not limit:
        warnings.append(f"has maxmemory-policy {policy}: once maxmemory is set, it evicts labels. Set it to noeviction")
    needed = round(_HEADROOM * needed_bytes)
    if limit and limit < needed:
        warnings.append(
            f"has maxmemory {limit} bytes, but queue.max_bytes and queue.max_dead_letter_bytes need {needed}. "
            "Raise maxmemory, or lower these settings"
        )
    return warnings


def _persistence_warnings(info: Info, config: Mapping[str, str]) -> list[str]:
    if info.get("aof_enabled") == "1":
        if info.get("aof_last_write_status", "ok") != "ok":
            return ["failed to write its append-only file. Read its log"]
        appendfsync = config.get("appendfsync", "always")
        if appendfsync == "always":
            return []
        lost = "the last second of labels" if appendfsync == "everysec" else "the last labels"
        return [f"has appendfsync {appendfsync}: a power failure loses {lost}. Set it to always"]
    if "aof_enabled" not in info:
        return []
    if config.get("save") == "":
        return [
            'writes nothing to disk (appendonly no, save ""), so labels are lost when it stops. '
            "Set appendonly to yes and appendfsync to always"
        ]
    return [
        "has no append-only file (appendonly no), so labels published after its last snapshot are lost when it stops. "
        "Set appendonly to yes and appendfsync to always"
    ]


def _bytes(info: Info, name: str) -> int:
    value = info.get(name, "")
    return int(value) if value.isdecimal() else 0
