"""Which policy is being served, and which push may follow it (DESIGN §3: versions, all-or-nothing)."""

from __future__ import annotations

from dataclasses import dataclass

from poise.errors import Conflict


@dataclass(frozen=True, slots=True)
class ServedPolicy:
    """A version within a lineage; the empty lineage is the model as it was loaded."""

    lineage_id: str = ""
    policy_version: int = 0
    digest: bytes = b""


def admit_push(served: ServedPolicy, pushed: ServedPolicy) -> bool:
    """Return whether a push must be applied; False when it is being served already.

    A new lineage may begin at any version: another learner numbers from here on.

    Raises:
        Conflict: the same lineage at this version with other weights, or at a lower version.
    """
    if pushed == served:
        return False
    if pushed.lineage_id != served.lineage_id or pushed.policy_version > served.policy_version:
        return True
    if pushed.policy_version == served.policy_version:
        raise Conflict(
            f"version {pushed.policy_version} is served with other weights",
            remedy="Two learners share a lineage, or one lost its state: give the learner a fresh state_dir.",
        )
    raise Conflict(
        f"version {pushed.policy_version} is older than version {served.policy_version}, which is served",
        remedy="Push a version above it; a learner that went back starts a new lineage.",
    )
