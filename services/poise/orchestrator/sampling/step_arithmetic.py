"""The arithmetic of a step: from rollouts, rewards and values to baselines, advantages and labels.

Pure. What is shown of it is `numbers`'s. Knows neither services nor files. Shapes: n siblings of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from poise.algorithms.baselines import advantages, batch_mean, mean_of_others
from poise.algorithms.group_baselines import Centring
from poise_client.types import Batch, Floats, Group, GroupBaselines

Bootstrap = Literal["rloo", "batch_mean"]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A finished group whose rewards are known."""

    group: Group
    domain: str
    rewards: Floats
    """[n], in [0, 1]."""
    prompt_key: str = ""
    """Identity of the prompt, the same in every step."""


@dataclass(frozen=True, slots=True)
class StepBaselines:
    """The baselines of a step, by group."""

    baselines: list[Floats]
    """[n] each."""
    source: str
    """What they are of: "probe", "bootstrap", "mixed" of the two, "group", "batch", "tracker", or "critic"."""
    values: Sequence[Floats | None] = ()
    """[n] each: what the probe expected; None where a domain has no probe. Empty where no probe is asked."""
    probe_versions: Mapping[str, int] = field(default_factory=dict)
    """By domain."""
    settled: bool | None = None
    """Whether the probe was known to be fitted on all labels published before the step; None where none is asked."""
    scales: Sequence[Floats] = ()
    """[n] each: what reward − baseline is divided by; empty divides by nothing."""
    penalties: Sequence[Floats] = ()
    """[n] each: what is added to the rewards before; empty adds nothing."""

    @property
    def by_critic(self) -> bool:
        """Whether these are none, and the learner's critic makes the advantages."""
        return self.source == "critic"

    def value(self, index: int) -> Floats | None:
        """Return what the probe expected of the group at `index`, [n]; None where there is no probe."""
        return self.values[index] if self.values else None

    def advantages(self, index: int, rewards: Floats) -> Floats:
        """Return the advantages of the group at `index`, [n]: (r + penalty − b) / s."""
        shaped = rewards + self.penalties[index] if self.penalties else rewards
        centred = advantages(shaped, self.baselines[index])
        return (centred / self.scales[index]).astype(np.float32) if self.scales else centred


def rewards_of(scored: Sequence[ScoredGroup]) -> list[Floats]:
    """Return the rewards of each group, [n] each."""
    return [item.rewards for item in scored]


def lengths_of(scored: Sequence[ScoredGroup]) -> list[Floats]:
    """Return the response tokens of each group's rollouts, [n] each."""
    return [np.array([r.token_ids.size for r in item.group.rollouts], np.float32) for item in scored]


def centred(
    scored: Sequence[ScoredGroup], source: str, centring: Centring, penalties: Sequence[Floats] | None = None
) -> StepBaselines:
    """Return the baselines that a rival's formula gave, one for each group."""
    assert len(centring.baselines) == len(scored)  # noqa: S101 (the formula saw these groups)
    return StepBaselines(centring.baselines, source, scales=centring.scales, penalties=penalties or ())


def left_to_critic(scored: Sequence[ScoredGroup]) -> StepBaselines:
    """Return what leaves the advantages to the learner's critic."""
    return StepBaselines([np.zeros_like(item.rewards) for item in scored], "critic")


def labelled_groups(scored: Sequence[ScoredGroup]) -> list[Group]:
    """Return the groups with their rewards and domains: what the value service values and learns from."""
    return [item.group.scored(item.rewards, item.domain) for item in scored]


def choose_baselines(
    scored: Sequence[ScoredGroup], answers: Sequence[GroupBaselines], bootstrap: Bootstrap
) -> StepBaselines:
    """Take the probe's baselines where it gave any, else the bootstrap's."""
    rewards = [item.rewards for item in scored]
    fallback = batch_mean(rewards) if bootstrap == "batch_mean" else [mean_of_others(r) for r in rewards]
    baselines = [
        spare if answer.baselines is None else answer.baselines for answer, spare in zip(answers, fallback, strict=True)
    ]
    num_probed = sum(answer.values is not None for answer in answers)
    source = "probe" if num_probed == len(answers) else "mixed" if num_probed else "bootstrap"
    versions = {item.domain: answer.probe_version for item, answer in zip(scored, answers, strict=True)}
    settled = all(answer.up_to_date for answer in answers)
    return StepBaselines(baselines, source, [answer.values for answer in answers], versions, settled)


def training_batch(
    run_id: str, step: int, scored: Sequence[ScoredGroup], baselines: StepBaselines, temperature: float
) -> Batch:
    """Return what the learner trains on."""
    by_critic, rollouts = baselines.by_critic, []
    for index, item in enumerate(scored):
        advantages_n = np.zeros_like(item.rewards) if by_critic else baselines.advantages(index, item.rewards)
        rollouts += [
            dataclasses.replace(rollout, advantage=float(advantage), reward=float(reward) if by_critic else None)
            for rollout, advantage, reward in zip(item.group.rollouts, advantages_n, item.rewards, strict=True)
        ]
    return Batch(run_id, f"step-{step:08d}", step, tuple(rollouts), temperature)
