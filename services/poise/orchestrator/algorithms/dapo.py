"""DAPO (arXiv 2503.14476): GRPO with dynamic sampling, overlong penalty, clip-higher and token-mean loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from poise.algorithms.group_baselines import group_mean, overlong_penalty
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, lengths_of, rewards_of


class DapoOptions(AlgorithmOptions):
    """DAPO: GRPO on groups of unequal rewards. Other groups are dropped, and more prompts are sampled instead. The
    learner's defaults are its clip-higher and token-mean loss."""

    RENAMED: ClassVar[Mapping[str, str]] = {"std_normalisation": "std_normalization"}

    kind: Literal["dapo"] = "dapo"
    """This algorithm."""
    max_draws: int = Field(4, ge=1, le=64)
    """Maximum number of times a step draws prompts to fill its batch with groups of unequal rewards. After the last
    draw it trains on the groups it has."""
    overlong_margin_tokens: int = Field(0, ge=0)
    """Length of the penalty zone before `sampling.max_tokens`. The penalty grows linearly to 1 at its end. 0 disables
    it."""
    std_normalization: bool = True
    """Divide by the standard deviation of the group's rewards."""

    @property
    def biases(self) -> tuple[str, ...]:
        """See `AlgorithmOptions`."""
        return ("own_reward", *["standard_deviation"] * self.std_normalization, "dropped_groups")

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Dapo(self, max_tokens)


class Dapo(Algorithm):
    """Trains on groups of unequal rewards."""

    def __init__(self, options: DapoOptions, max_tokens: int) -> None:
        self._options = options
        self._max_tokens = max_tokens
        self.max_draws = options.max_draws

    def keeps(self, group: ScoredGroup) -> bool:
        """See `Algorithm`: whether the rewards, before the penalty, differ."""
        return bool(group.rewards.min() < group.rewards.max())

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """See `Algorithm`."""
        rewards, penalties = rewards_of(groups), []
        if margin := min(self._options.overlong_margin_tokens, self._max_tokens):
            penalties = [overlong_penalty(lengths_n, self._max_tokens, margin) for lengths_n in lengths_of(groups)]
            rewards = [r + penalty for r, penalty in zip(rewards, penalties, strict=True)]
        scaled = group_mean(rewards, divide=self._options.std_normalization)
        return StepBaselines(scaled.baselines, "group", scales=scaled.scales, penalties=penalties)
