"""Makes groups from features and rewards, for tests that sample nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from poise_client.types import DEFAULT_DOMAIN, Features, Group, Rollout, RolloutId


def make_group(
    group_id: str,
    features: Sequence[Features],
    rewards: ArrayLike | None = None,
    *,
    domain: str = DEFAULT_DOMAIN,
    run_id: str = "run",
    step: int = 0,
) -> Group:
    """Return a group whose rollouts have features, and rewards if given, [n]."""
    rollouts = [Rollout(RolloutId(run_id, step, group_id, i), features=each) for i, each in enumerate(features)]
    group = Group(group_id, tuple(rollouts), domain)
    return group if rewards is None else group.scored(np.asarray(rewards, np.float32))


def moved(group: Group, run_id: str, step: int) -> Group:
    """Return a group as if another run and step had sampled it."""
    rollouts = tuple(
        dataclasses.replace(rollout, id=dataclasses.replace(rollout.id, run_id=run_id, step=step))
        for rollout in group.rollouts
    )
    return dataclasses.replace(group, rollouts=rollouts)
