"""PPO: a critic of the policy's own size, trained beside it by the learner, and advantages token by token (GAE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, AskProbe
from poise.orchestrator.algorithms.group import PPO_CLIP
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines, left_to_critic


class PpoOptions(AlgorithmOptions):
    """PPO: the learner's critic says what each token's state let expect; `learner.critic` has its settings."""

    min_rollouts: ClassVar[int] = 1
    needs_critic: ClassVar[bool] = True
    usual_rollouts: ClassVar[int] = 1
    kind: Literal["ppo"] = "ppo"
    """This algorithm."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Ppo()

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"critic": {}, "loss": PPO_CLIP}


class Ppo(Algorithm):
    """Leaves it to the critic."""

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        """See `Algorithm`."""
        return left_to_critic(scored)
