"""The policy version being served, and the rule for pushes that replace it."""

from __future__ import annotations

from dataclasses import dataclass

from poise.errors import Conflict


@dataclass(frozen=True, slots=True)
class ServedPolicy:
    """A policy version of one lineage. An empty lineage id means the model as loaded from disk."""

    lineage_id: str = ""
    policy_version: int = 0
    digest: bytes = b""


def must_apply(served: ServedPolicy, pushed: ServedPolicy) -> bool:
    """Return whether a push must be applied; False if exactly this version is already served.

    A new lineage can start at any version, because another learner numbers it.

    Raises:
        Conflict: within the lineage, the version is lower, or equal with other weights.
    """
    if pushed == served:
        return False
    if pushed.lineage_id != served.lineage_id or pushed.policy_version > served.policy_version:
        return True
    if pushed.policy_version == served.policy_version:
        raise Conflict(
            f"version {pushed.policy_version} is already served with other weights",
            remedy="Two learners share a lineage, or one lost its state: give each learner its own, empty state_dir.",
        )
    raise Conflict(
        f"version {pushed.policy_version} is older than version {served.policy_version}, which is served",
        remedy="Push a higher version. A learner that went back to an earlier version must start a new lineage.",
    )
