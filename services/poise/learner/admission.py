"""Decides which rollouts of a batch are trained on. Enforces staleness and exactly-once training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

from poise.algorithms.staleness import staleness
from poise_client.types import Batch, Rollout, RolloutId


@dataclass(frozen=True, slots=True)
class Admission:
    """The rollouts of a batch, accepted or rejected."""

    accepted: list[Rollout] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)
    """16-byte digests of the accepted rollouts' ids."""
    ages: Counter[int] = field(default_factory=Counter)
    """Number of accepted rollouts by staleness."""
    rejected: list[tuple[RolloutId, str]] = field(default_factory=list)
    """Ids with a reason: "duplicate", "future_version" or "stale"."""


def admit(batch: Batch, seen: Set[bytes], policy_version: int, max_staleness: int) -> Admission:
    """Accept rollouts that are not in `seen` and whose staleness under `policy_version` is at most `max_staleness`."""
    admission = Admission()
    for rollout in batch.rollouts:
        age = staleness((span.policy_version for span in rollout.version_spans), policy_version)
        digest = _digest(rollout.id)
        if digest in seen or digest in admission.digests:
            admission.rejected.append((rollout.id, "duplicate"))
        elif age < 0:
            admission.rejected.append((rollout.id, "future_version"))
        elif age > max_staleness:
            admission.rejected.append((rollout.id, "stale"))
        else:
            admission.digests.add(digest)
            admission.ages[age] += 1
            admission.accepted.append(rollout)
    return admission


def _digest(rollout_id: RolloutId) -> bytes:
    text = f"{rollout_id.run_id}\0{rollout_id.step}\0{rollout_id.group_id}\0{rollout_id.rollout_index}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
