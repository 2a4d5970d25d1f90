"""SPO (arXiv 2509.13232): one rollout of each prompt, with a tracker of the prompt's past rewards as the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from poise.algorithms.group_baselines import ScaledBaselines, whitened
from poise.algorithms.spo_tracker import BetaTracker
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines, State
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, rewards_of

KEY_CHARS = 16
"""Length of a tracker's key, in hexadecimal digits of the prompt's hash: unique for a billion prompts."""


class SpoOptions(AlgorithmOptions):
    """SPO: the baseline is a tracker of the prompt's rewards in earlier steps."""

    RENAMED: ClassVar[Mapping[str, str]] = {"batch_normalisation": "batch_normalization"}

    min_rollouts: ClassVar[int] = 1
    default_rollouts: ClassVar[int] = 1
    kind: Literal["spo"] = "spo"
    """This algorithm."""
    half_life_visits: float = Field(8.0, gt=0)
    """Visits to a prompt after which a reward counts half, because the policy has changed since."""
    prior_value: float = Field(0.5, gt=0, lt=1)
    """Baseline of a prompt before its first visit."""
    prior_strength: float = Field(1.0, gt=0)
    """Weight of the prior, in rollouts."""
    batch_normalization: bool = True
    """Whiten the advantages over the batch."""

    @property
    def biases(self) -> tuple[str, ...]:
        """See `AlgorithmOptions`."""
        return ("own_reward", "standard_deviation") if self.batch_normalization else ()

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Spo(self)


class Spo(Algorithm):
    """Keeps a tracker of every prompt."""

    def __init__(self, options: SpoOptions) -> None:
        self._options = options
        self._discount = 0.5 ** (1 / options.half_life_visits)
        self._prior = BetaTracker.prior(options.prior_value, options.prior_strength)
        self._trackers: dict[str, BetaTracker] = {}

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """See `Algorithm`."""
        values = [np.full(item.rewards.shape, self._tracker(item).value, np.float32) for item in groups]
        whiten = self._options.batch_normalization
        scaled = whitened(rewards_of(groups), values) if whiten else ScaledBaselines(values)
        return StepBaselines(scaled.baselines, "tracker", scales=scaled.scales)

    def step_state(self, groups: Sequence[ScoredGroup]) -> State:
        """See `Algorithm`: the trackers of the step's prompts, with the step's rewards."""
        after: dict[str, BetaTracker] = {}
        for item in groups:
            key = _key(item)
            after[key] = after.get(key, self._tracker(item)).after(item.rewards, self._discount)
        return {"trackers": {key: [tracker.successes, tracker.failures] for key, tracker in after.items()}}

    def load_step_state(self, state: State) -> None:
        """See `Algorithm`."""
        trackers: Mapping[str, Any] = state.get("trackers", {})
        self._trackers |= {key: BetaTracker(*counts) for key, counts in trackers.items()}

    def _tracker(self, item: ScoredGroup) -> BetaTracker:
        return self._trackers.get(_key(item), self._prior)


def _key(item: ScoredGroup) -> str:
    return item.problem.prompt_key[:KEY_CHARS]
