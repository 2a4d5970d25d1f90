"""An algorithm of your own: the baseline is the best reward of the group. See docs/how_to/add_an_algorithm.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from poise.algorithms.group_baselines import Centring
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, AskProbe
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines, centred


class BestOfOptions(AlgorithmOptions):
    """The best reward of the group is the baseline."""

    kind: Literal["best_of"] = "best_of"
    """Selects this algorithm."""
    margin: float = 0.0
    """Subtracted from the best reward."""

    def make(self, max_tokens: int) -> Algorithm:
        return BestOf(self.margin)


class BestOf(Algorithm):
    def __init__(self, margin: float) -> None:
        self._margin = margin

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        best = [np.full_like(item.rewards, item.rewards.max() - self._margin) for item in scored]
        ones = [np.ones_like(item.rewards) for item in scored]
        return centred(scored, "group", Centring(best, ones))
