"""POISE: the probe's cross-rollout baselines (arXiv 2605.07579, DESIGN §2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, AskProbe
from poise.orchestrator.sampling.step_arithmetic import Bootstrap, ScoredGroup, StepBaselines, choose_baselines


class PoiseOptions(AlgorithmOptions):
    """The probe's cross-rollout baselines: what the siblings' hidden states and rewards let expect."""

    needs_probe: ClassVar[bool] = True
    usual_rollouts: ClassVar[int] = 2
    kind: Literal["poise"] = "poise"
    """This algorithm."""
    bootstrap: Bootstrap = "rloo"
    """Baseline of a domain while it has no probe: the siblings' mean reward, or `batch_mean`, that of the other
    prompts."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Poise(self)


class Poise(Algorithm):
    """Asks the probe, which learns from every step."""

    def __init__(self, options: PoiseOptions) -> None:
        self._bootstrap = options.bootstrap

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        """See `Algorithm`."""
        return choose_baselines(scored, await ask_probe(), self._bootstrap)
