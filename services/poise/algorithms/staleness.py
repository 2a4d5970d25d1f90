"""How old a rollout is, counted in policy versions."""

from __future__ import annotations

from collections.abc import Iterable


def staleness(span_versions: Iterable[int], current_version: int) -> int:
    """Return `current_version` minus the oldest version that sampled a token; negative when it is from the future.

    Raises:
        ValueError: no span.
    """
    versions = list(span_versions)
    if not versions:
        raise ValueError("a rollout has at least one version span")
    if max(versions) > current_version:
        return current_version - max(versions)
    return current_version - min(versions)
