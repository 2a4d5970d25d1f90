"""POISE: baselines from the value service's estimator, which is a probe (arXiv 2605.07579) or score-weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, EstimateBaselines
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, rewards_of
from poise_client.types import Estimator, Floats

Bootstrap = Literal["rloo", "batch_mean", "none"]


class PoiseOptions(AlgorithmOptions):
    """POISE: the value service's estimator gives the baselines. The paper's estimator is `probe`."""

    needs_probe: ClassVar[bool] = True
    kind: Literal["poise"] = "poise"
    """This algorithm."""
    estimator: Estimator = "probe"
    """Estimator of baselines. `probe`: the siblings' values, predicted from their hidden states and rewards; needs two
    rollouts of each prompt. The others weight rewards of earlier steps by squared score norms and need one rollout:
    `score_mean` (one baseline for the domain), `score_prefix` (one for each token, from the statistics of earlier
    tokens), `score_prompt` (also from the prompt), and `auto` (the most accurate of these three). run.yaml passes it to
    `value.estimator`."""
    bootstrap: Bootstrap | None = None
    """Baseline of a domain without a fitted estimator: `rloo`, the mean reward of the siblings, `batch_mean`, the mean
    reward of the step's other prompts, or `none`. Null means `rloo` for the probe and `none` for other estimators."""

    @property
    def min_rollouts(self) -> int:
        """See `AlgorithmOptions`."""
        return 2 if self.estimator == "probe" or self.bootstrap == "rloo" else 1

    @property
    def default_rollouts(self) -> int:
        """See `AlgorithmOptions`."""
        return self.min_rollouts

    @property
    def bootstrap_baseline(self) -> Bootstrap:
        """`bootstrap`, or its default for the estimator."""
        return self.bootstrap or ("rloo" if self.estimator == "probe" else "none")

    def problem(self, rollouts_per_prompt: int, prompts_per_step: int) -> str | None:
        """See `AlgorithmOptions`."""
        if rollouts_per_prompt < 2 and self.estimator == "probe":
            return (
                f"rollouts_per_prompt: is {rollouts_per_prompt}; algorithm.estimator: probe needs at least 2, or use "
                "another estimator, such as score_prefix"
            )
        if rollouts_per_prompt < 2 and self.bootstrap == "rloo":
            return (
                f"rollouts_per_prompt: is {rollouts_per_prompt}; algorithm.bootstrap: rloo needs at least 2, or use "
                "bootstrap: none"
            )
        if prompts_per_step < 2 and self.bootstrap == "batch_mean":
            other = "rloo" if rollouts_per_prompt > 1 else "none"
            return (
                f"prompts_per_step: is 1; algorithm.bootstrap: batch_mean needs at least 2, or use bootstrap: {other}"
            )
        return None

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Poise(self.bootstrap_baseline)

    def value_settings(self) -> dict[str, Any]:
        """See `AlgorithmOptions`."""
        return {"estimator": self.estimator}


class Poise(Algorithm):
    """Uses the estimator's baselines, and the bootstrap baselines for domains without a fitted estimator."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """See `Algorithm`."""
        answers = await estimate()
        tokens = [answer.token_baselines for answer in answers]
        # One baseline for each token has a mean for each rollout, for the metrics.
        estimated = [answer.values if answer.token_baselines else answer.baselines for answer in answers]
        fallback = self._fallback(rewards_of(groups))
        sources = {
            "bootstrap" if own is None else _source(a.estimator) for own, a in zip(estimated, answers, strict=True)
        }
        return StepBaselines(
            [bootstrap if own is None else own for own, bootstrap in zip(estimated, fallback, strict=True)],
            source=sources.pop() if len(sources) == 1 else "mixed",
            values=[answer.values for answer in answers],
            token_baselines=tokens if any(tokens) else (),
            probe_versions={item.domain: each.probe_version for item, each in zip(groups, answers, strict=True)},
            estimators={
                item.domain: each.estimator for item, each in zip(groups, answers, strict=True) if each.estimator
            },
            up_to_date=all(answer.up_to_date for answer in answers),
        )

    def _fallback(self, rewards: Sequence[Floats]) -> Sequence[Floats]:
        if self._bootstrap == "batch_mean":
            return batch_mean(rewards)
        return [mean_of_others(r) if self._bootstrap == "rloo" else np.zeros_like(r) for r in rewards]


def _source(estimator: str) -> str:
    return "score" if estimator.startswith("score_") else "probe"
