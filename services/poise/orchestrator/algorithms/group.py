"""Algorithms whose baselines need only the step's rewards: RLOO, GRPO, Dr. GRPO, OPO, REINFORCE++, and two controls.

The controls are no baseline, and the mean reward of the step's other prompts.

The formulas are in `poise.algorithms.group_baselines`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from poise.algorithms.baselines import batch_mean
from poise.algorithms.group_baselines import ScaledBaselines, group_mean, length_weighted_mean, rloo, whitened
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, lengths_of, rewards_of

PPO_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
"""The symmetric clip range of PPO, GRPO and Dr. GRPO."""


class RewardBaselines(Algorithm):
    """Computes baselines from the rewards and response lengths of the step."""

    def __init__(self, source: str, formula: Callable[[Sequence[ScoredGroup]], ScaledBaselines]) -> None:
        """Use `formula`; `source` is the name of the baseline in metrics.jsonl."""
        self._source = source
        self._formula = formula

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """See `Algorithm`."""
        scaled = self._formula(groups)
        return StepBaselines(scaled.baselines, self._source, scales=scaled.scales)


class RlooOptions(AlgorithmOptions):
    """REINFORCE leave-one-out: the baseline is the mean reward of the siblings."""

    kind: Literal["rloo"] = "rloo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("group", lambda groups: rloo(rewards_of(groups)))


class GrpoOptions(AlgorithmOptions):
    """GRPO: the baseline is the group's mean reward, the scale its standard deviation. The loss weighs all rollouts
    equally."""

    RENAMED: ClassVar[Mapping[str, str]] = {"std_normalisation": "std_normalization"}

    kind: Literal["grpo"] = "grpo"
    """This algorithm."""
    std_normalization: bool = True
    """Divide by the standard deviation of the group's rewards."""

    @property
    def biases(self) -> tuple[str, ...]:
        """See `AlgorithmOptions`."""
        return ("own_reward", *["standard_deviation"] * self.std_normalization)

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("group", lambda groups: group_mean(rewards_of(groups), divide=self.std_normalization))

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"loss": {"aggregation": "sequence_mean", **PPO_CLIP}}


class DrGrpoOptions(AlgorithmOptions):
    """Dr. GRPO: the baseline is the group's mean reward, without a scale. The loss weighs all tokens equally."""

    biases: ClassVar[tuple[str, ...]] = ("own_reward",)
    kind: Literal["dr_grpo"] = "dr_grpo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("group", lambda groups: group_mean(rewards_of(groups), divide=False))

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"loss": {"aggregation": "constant", "normalizer_tokens": max_tokens, **PPO_CLIP}}


class OpoOptions(AlgorithmOptions):
    """OPO: the baseline is the group's mean reward, weighted by response length."""

    biases: ClassVar[tuple[str, ...]] = ("own_reward",)
    kind: Literal["opo"] = "opo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("group", lambda groups: length_weighted_mean(rewards_of(groups), lengths_of(groups)))


class ReinforcePpOptions(AlgorithmOptions):
    """REINFORCE++: rewards are whitened over the whole batch."""

    min_rollouts: ClassVar[int] = 1
    biases: ClassVar[tuple[str, ...]] = ("own_reward", "standard_deviation")
    kind: Literal["reinforce_pp"] = "reinforce_pp"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("batch", lambda groups: whitened(rewards_of(groups)))

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"loss": PPO_CLIP}


class NoneOptions(AlgorithmOptions):
    """No baseline: the advantage is the reward. A control for comparisons."""

    min_rollouts: ClassVar[int] = 1
    default_rollouts: ClassVar[int] = 1
    kind: Literal["none"] = "none"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("none", lambda groups: ScaledBaselines([np.zeros_like(item.rewards) for item in groups]))


class BatchMeanOptions(AlgorithmOptions):
    """The baseline is the mean reward of the step's other prompts. A control for comparisons."""

    min_rollouts: ClassVar[int] = 1
    default_rollouts: ClassVar[int] = 1
    kind: Literal["batch_mean"] = "batch_mean"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return RewardBaselines("batch", lambda groups: ScaledBaselines(batch_mean(rewards_of(groups))))

    def problem(self, rollouts_per_prompt: int, prompts_per_step: int) -> str | None:
        """See `AlgorithmOptions`."""
        if prompts_per_step < 2:
            return "prompts_per_step: is 1; algorithm batch_mean needs at least 2"
        return None
