"""SPO (arXiv 2509.13232): one rollout a prompt, against what that prompt's own past let expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from poise.algorithms import group_baselines
from poise.algorithms.group_baselines import Centring
from poise.algorithms.spo_tracker import BetaTracker
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, AskProbe, Memory
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines, centred, rewards_of

KEY_CHARS = 16
"""Of a prompt's identity, hexadecimal: enough to tell a billion prompts apart."""


class SpoOptions(AlgorithmOptions):
    """SPO: a tracker of each prompt's rewards so far, used before it learns the step's own."""

    min_rollouts: ClassVar[int] = 1
    usual_rollouts: ClassVar[int] = 1
    kind: Literal["spo"] = "spo"
    """This algorithm."""
    half_life_visits: float = Field(8.0, gt=0)
    """Visits to a prompt after which a reward counts half: the policy that earned it is gone."""
    prior_value: float = Field(0.5, gt=0, lt=1)
    """What is expected of a prompt never seen."""
    prior_strength: float = Field(1.0, gt=0)
    """As firmly as so many rollouts would have it expected."""
    batch_normalisation: bool = True
    """Whiten the advantages over the batch."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Spo(self)


class Spo(Algorithm):
    """Remembers every prompt that it saw."""

    def __init__(self, options: SpoOptions) -> None:
        self._options = options
        self._discount = 0.5 ** (1 / options.half_life_visits)
        self._prior = BetaTracker.prior(options.prior_value, options.prior_strength)
        self._trackers: dict[str, BetaTracker] = {}

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        """See `Algorithm`."""
        values = [np.full(item.rewards.shape, self._tracker(item).value, np.float32) for item in scored]
        rewards = rewards_of(scored)
        ones = [np.ones(r.shape, np.float32) for r in rewards]
        normalise = self._options.batch_normalisation
        return centred(
            scored, "tracker", group_baselines.whitened(rewards, values) if normalise else Centring(values, ones)
        )

    def remember(self, scored: Sequence[ScoredGroup]) -> Memory:
        """See `Algorithm`: the trackers of the step's prompts, after it."""
        after: dict[str, BetaTracker] = {}
        for item in scored:
            key = _key(item)
            after[key] = after.get(key, self._tracker(item)).after(item.rewards, self._discount)
        return {"trackers": {key: [tracker.successes, tracker.failures] for key, tracker in after.items()}}

    def recall(self, memory: Memory) -> None:
        """See `Algorithm`."""
        trackers: Mapping[str, Any] = memory.get("trackers", {})
        self._trackers |= {key: BetaTracker(*counts) for key, counts in trackers.items()}

    def _tracker(self, item: ScoredGroup) -> BetaTracker:
        return self._trackers.get(_key(item), self._prior)


def _key(item: ScoredGroup) -> str:
    return item.prompt_key[:KEY_CHARS]
