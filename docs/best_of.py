"""An algorithm of your own: the baseline is the best reward of the group. See docs/how_to/add_an_algorithm.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines


class BestOfOptions(AlgorithmOptions):
    """The baseline is the best reward of the group, minus a margin."""

    kind: Literal["best_of"] = "best_of"
    """Selects this algorithm."""
    margin: float = 0.0
    """Subtracted from the best reward."""

    def make(self, max_tokens: int) -> Algorithm:
        return BestOf(self.margin)


class BestOf(Algorithm):
    def __init__(self, margin: float) -> None:
        self._margin = margin

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        best = [np.full_like(item.rewards, item.rewards.max() - self._margin) for item in groups]
        return StepBaselines(best, "group")
