"""Baselines from the rewards of a step alone: RLOO, GRPO, Dr. GRPO, OPO, REINFORCE++.

`algorithms.group_baselines` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from poise.algorithms import group_baselines
from poise.algorithms.group_baselines import Centring
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, AskProbe
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines, centred, lengths_of, rewards_of

PPO_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
"""The symmetric clip that GRPO's family was published with."""


class Rewards(Algorithm):
    """Of the rewards and lengths of all groups, whatever function it is given."""

    def __init__(self, source: str, centre: Callable[[Sequence[ScoredGroup]], Centring]) -> None:
        self._source = source
        self._centre = centre

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        """See `Algorithm`."""
        return centred(scored, self._source, self._centre(scored))


class RlooOptions(AlgorithmOptions):
    """REINFORCE leave-one-out: the mean of the siblings' rewards."""

    kind: Literal["rloo"] = "rloo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Rewards("group", lambda scored: group_baselines.rloo(rewards_of(scored)))


class GrpoOptions(AlgorithmOptions):
    """GRPO: the group's mean reward, divided by its standard deviation; every rollout counts the same in the loss."""

    kind: Literal["grpo"] = "grpo"
    """This algorithm."""
    std_normalisation: bool = True
    """Divide by the standard deviation of the group's rewards."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        centre = partial(group_baselines.group_mean, divide=self.std_normalisation)
        return Rewards("group", lambda scored: centre(rewards_of(scored)))

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"loss": {"aggregation": "sequence_mean", **PPO_CLIP}}


class DrGrpoOptions(AlgorithmOptions):
    """Dr. GRPO: the group's mean reward, divided by nothing; in the loss every token counts the same, everywhere."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Rewards("group", lambda scored: group_baselines.group_mean(rewards_of(scored), divide=False))

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"loss": {"aggregation": "constant", "normaliser_tokens": max_tokens, **PPO_CLIP}}


class OpoOptions(AlgorithmOptions):
    """OPO: the group's mean reward, weighted by the responses' lengths."""

    kind: Literal["opo"] = "opo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Rewards(
            "group", lambda scored: group_baselines.length_weighted_mean(rewards_of(scored), lengths_of(scored))
        )


class ReinforcePpOptions(AlgorithmOptions):
    """REINFORCE++: rewards whitened over the whole batch."""

    min_rollouts: ClassVar[int] = 1
    kind: Literal["reinforce_pp"] = "reinforce_pp"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Rewards("batch", lambda scored: group_baselines.whitened(rewards_of(scored)))

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"loss": PPO_CLIP}
