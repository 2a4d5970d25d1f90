"""The data of one step: scored groups, baselines, labels and the training batch.

Shapes: n rollouts of one prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from poise.algorithms.baselines import advantages
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Batch, Floats, Group


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A finished group with its rewards."""

    group: Group
    problem: Problem
    rewards: Floats
    """[n], in [0, 1]."""

    @property
    def domain(self) -> str:
        """The domain, which selects the probe."""
        return self.problem.domain


@dataclass(frozen=True, slots=True)
class StepBaselines:
    """The baselines of a step. Every sequence has one array [n] for each group."""

    baselines: Sequence[Floats]
    source: str
    """Their origin: `probe`, `bootstrap`, `mixed` (both), `group`, `batch`, `tracker` or `critic`."""
    values: Sequence[Floats | None] = ()
    """The probe's values; None for a domain without a probe. Empty for algorithms without a probe."""
    probe_versions: Mapping[str, int] = field(default_factory=dict)
    """By domain."""
    up_to_date: bool | None = None
    """Whether the probe was fitted on all labels published before the step; None for algorithms without a probe."""
    scales: Sequence[Floats] = ()
    """Divisors of reward − baseline; empty if there are none."""
    penalties: Sequence[Floats] = ()
    """Added to the rewards; empty if there are none."""

    @property
    def uses_critic(self) -> bool:
        """Whether the learner's critic computes the advantages instead."""
        return self.source == "critic"

    def value(self, index: int) -> Floats | None:
        """Return the probe's values of a group, [n]; None without a probe."""
        return self.values[index] if self.values else None

    def advantages(self, index: int, rewards: Floats) -> Floats:
        """Return the advantages of a group, [n]: (reward + penalty − baseline) / scale."""
        shaped = rewards + self.penalties[index] if self.penalties else rewards
        differences = advantages(shaped, self.baselines[index])
        return (differences / self.scales[index]).astype(np.float32) if self.scales else differences


def rewards_of(groups: Sequence[ScoredGroup]) -> list[Floats]:
    """Return the rewards of each group, [n] each."""
    return [item.rewards for item in groups]


def lengths_of(groups: Sequence[ScoredGroup]) -> list[Floats]:
    """Return the number of response tokens of each group's rollouts, [n] each."""
    return [np.array([r.token_ids.size for r in item.group.rollouts], np.float32) for item in groups]


def labelled_groups(groups: Sequence[ScoredGroup]) -> list[Group]:
    """Return the groups with rewards and domains, as the value service estimates baselines and learns from them."""
    return [item.group.scored(item.rewards, item.domain) for item in groups]


def training_batch(
    run_id: str, step: int, groups: Sequence[ScoredGroup], baselines: StepBaselines, temperature: float
) -> Batch:
    """Return the batch that the learner trains on: rollouts with advantages, or with rewards for a critic."""
    uses_critic, rollouts = baselines.uses_critic, []
    for index, item in enumerate(groups):
        advantages_n = np.zeros_like(item.rewards) if uses_critic else baselines.advantages(index, item.rewards)
        rollouts += [
            dataclasses.replace(rollout, advantage=float(advantage), reward=float(reward) if uses_critic else None)
            for rollout, advantage, reward in zip(item.group.rollouts, advantages_n, item.rewards, strict=True)
        ]
    return Batch(run_id, f"step-{step:08d}", step, tuple(rollouts), temperature)
