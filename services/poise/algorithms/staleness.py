"""Staleness of a rollout, in policy versions."""

from __future__ import annotations

from collections.abc import Iterable


def staleness(span_versions: Iterable[int], current_version: int) -> int:
    """Return `current_version` minus the oldest version that sampled a token.

    Negative if any token was sampled by a version newer than `current_version`.

    Raises:
        ValueError: there is no span.
    """
    versions = list(span_versions)
    if not versions:
        raise ValueError("the rollout has no version span; it needs at least one")
    if max(versions) > current_version:
        return current_version - max(versions)
    return current_version - min(versions)
