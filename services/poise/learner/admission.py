"""Which rollouts of a batch may be trained on, and which not, by name (DESIGN §3: staleness, exactly once). Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

from poise.algorithms.staleness import staleness
from poise_client.types import Batch, RolloutId, TrainingRollout


@dataclass(frozen=True, slots=True)
class Admission:
    """A batch, split."""

    accepted: list[TrainingRollout] = field(default_factory=list)
    names: set[bytes] = field(default_factory=set)
    """What stands for each accepted rollout, 16 bytes."""
    ages: Counter[int] = field(default_factory=Counter)
    """Accepted rollouts by how many versions old they are."""
    rejected: list[tuple[RolloutId, str]] = field(default_factory=list)
    """And why: "duplicate", "future_version" or "stale"."""


def admit(batch: Batch, seen: Set[bytes], policy_version: int, max_staleness: int) -> Admission:
    """Split a batch by what was trained on before (`seen`), and by age under the version of now."""
    split = Admission()
    for rollout in batch.rollouts:
        age = staleness((span.policy_version for span in rollout.version_spans), policy_version)
        name = _name(rollout.id)
        if name in seen or name in split.names:
            split.rejected.append((rollout.id, "duplicate"))
        elif age < 0:
            split.rejected.append((rollout.id, "future_version"))
        elif age > max_staleness:
            split.rejected.append((rollout.id, "stale"))
        else:
            split.names.add(name)
            split.ages[age] += 1
            split.accepted.append(rollout)
    return split


def _name(rollout_id: RolloutId) -> bytes:
    text = f"{rollout_id.run_id}\0{rollout_id.step}\0{rollout_id.group_id}\0{rollout_id.rollout_index}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
