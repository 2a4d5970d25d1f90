"""The data of one step: scored groups, baselines, labels and the training batch.

Shapes: n rollouts of one prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from poise.algorithms.baselines import advantages
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Batch, Floats, Group, ProbeReport, Rollout


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
    """One for each rollout. Where there is one for each token, its mean weighted by squared score norms."""
    source: str
    """Their origin: `probe`, `score` (score-weighted estimators), `bootstrap`, `mixed` (several of these), `group`,
    `batch`, `tracker`, `critic` or `none`."""
    values: Sequence[Floats | None] = ()
    """The estimator's values; None for a domain without a fitted one. Empty for algorithms without the value
    service."""
    token_baselines: Sequence[Sequence[Floats] | None] = ()
    """One array [T] for each rollout of a group: one baseline for each token. None for groups without, empty if there
    are none."""
    probe_versions: Mapping[str, int] = field(default_factory=dict)
    """By domain."""
    estimators: Mapping[str, str] = field(default_factory=dict)
    """The estimator that answered, by domain."""
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
        """Return the estimator's values of a group, [n]; None without a fitted one."""
        return self.values[index] if self.values else None

    def tokens(self, index: int) -> Sequence[Floats] | None:
        """Return the baselines of each rollout's tokens, [T] each; None if a group has one for each rollout."""
        return self.token_baselines[index] if self.token_baselines else None

    def advantages(self, index: int, rewards: Floats) -> Floats:
        """Return the advantages of a group, [n]: (reward + penalty − baseline) / scale."""
        shaped = rewards + self.penalties[index] if self.penalties else rewards
        differences = advantages(shaped, self.baselines[index])
        return (differences / self.scales[index]).astype(np.float32) if self.scales else differences

    def token_advantages(self, index: int, rewards: Floats) -> list[Floats] | None:
        """Return reward − baseline of each token, [T] for each rollout; None if a group has one for each rollout."""
        tokens = self.tokens(index)
        if tokens is None:
            return None
        return [advantages(np.full_like(b, reward), b) for reward, b in zip(rewards, tokens, strict=True)]


def rewards_of(groups: Sequence[ScoredGroup]) -> list[Floats]:
    """Return the rewards of each group, [n] each."""
    return [item.rewards for item in groups]


def lengths_of(groups: Sequence[ScoredGroup]) -> list[Floats]:
    """Return the number of response tokens of each group's rollouts, [n] each."""
    return [np.array([r.token_ids.size for r in item.group.rollouts], np.float32) for item in groups]


def labelled_groups(groups: Sequence[ScoredGroup], report: ProbeReport) -> list[Group]:
    """Return the groups with rewards and domains, as the value service estimates baselines and learns from them.

    They contain only the inputs of the estimators in the service's `report`.
    """
    return [report.needed_inputs(item.group.scored(item.rewards, item.domain)) for item in groups]


def training_batch(
    run_id: str, step: int, groups: Sequence[ScoredGroup], baselines: StepBaselines, temperature: float
) -> Batch:
    """Return the batch that the learner trains on: rollouts with advantages, or with rewards for a critic."""
    rollouts: list[Rollout] = []
    for index, item in enumerate(groups):
        if baselines.uses_critic:
            fields: list[dict[str, Any]] = [{"advantage": 0.0, "reward": float(reward)} for reward in item.rewards]
        elif (by_token := baselines.token_advantages(index, item.rewards)) is not None:
            fields = [{"advantage": None, "advantages": advantages_t, "reward": None} for advantages_t in by_token]
        else:
            by_rollout = baselines.advantages(index, item.rewards)
            fields = [{"advantage": float(advantage), "reward": None} for advantage in by_rollout]
        rollouts += [
            dataclasses.replace(rollout, **values) for rollout, values in zip(item.group.rollouts, fields, strict=True)
        ]
    return Batch(run_id, f"step-{step:08d}", step, tuple(rollouts), temperature)
