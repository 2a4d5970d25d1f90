"""PPO: the learner trains a critic as large as the policy, and computes token advantages by GAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines
from poise.orchestrator.algorithms.group import PPO_CLIP
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines


class PpoOptions(AlgorithmOptions):
    """PPO: the learner's critic predicts the value of each token. Its settings are in `learner.critic`."""

    min_rollouts: ClassVar[int] = 1
    needs_critic: ClassVar[bool] = True
    default_rollouts: ClassVar[int] = 1
    biases: ClassVar[tuple[str, ...]] = ("gae",)
    kind: Literal["ppo"] = "ppo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Ppo()

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"critic": {}, "loss": PPO_CLIP}


class Ppo(Algorithm):
    """Leaves the advantages to the learner's critic."""

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """See `Algorithm`."""
        return StepBaselines([np.zeros_like(item.rewards) for item in groups], "critic")
