"""POISE: cross-rollout baselines from the value service's probe (arXiv 2605.07579)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, rewards_of


class PoiseOptions(AlgorithmOptions):
    """POISE: the baseline is the probe's value of the siblings, predicted from their hidden states and rewards."""

    needs_probe: ClassVar[bool] = True
    default_rollouts: ClassVar[int] = 2
    kind: Literal["poise"] = "poise"
    """This algorithm."""
    bootstrap: Literal["rloo", "batch_mean"] = "rloo"
    """Baseline of a domain that has no probe yet: `rloo`, the mean reward of the siblings, or `batch_mean`, the mean
    reward of the step's other prompts."""

    def problem(self, rollouts_per_prompt: int, prompts_per_step: int) -> str | None:
        """See `AlgorithmOptions`."""
        if self.bootstrap == "batch_mean" and prompts_per_step < 2:
            return "prompts_per_step: is 1; algorithm.bootstrap: batch_mean needs at least 2, or use bootstrap: rloo"
        return None

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Poise(self)


class Poise(Algorithm):
    """Uses the probe's baselines, and the bootstrap baselines for domains without a probe."""

    def __init__(self, options: PoiseOptions) -> None:
        self._bootstrap = options.bootstrap

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """See `Algorithm`."""
        answers, rewards = await estimate(), rewards_of(groups)
        fallback = batch_mean(rewards) if self._bootstrap == "batch_mean" else [mean_of_others(r) for r in rewards]
        num_probed = sum(answer.values is not None for answer in answers)
        return StepBaselines(
            [
                bootstrap if answer.baselines is None else answer.baselines
                for answer, bootstrap in zip(answers, fallback, strict=True)
            ],
            source="probe" if num_probed == len(answers) else "mixed" if num_probed else "bootstrap",
            values=[answer.values for answer in answers],
            probe_versions={item.domain: each.probe_version for item, each in zip(groups, answers, strict=True)},
            up_to_date=all(answer.up_to_date for answer in answers),
        )
