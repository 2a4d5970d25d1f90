"""DAPO (arXiv 2503.14476): GRPO with dynamic sampling, overlong shaping, clip-higher and a token mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from poise.algorithms import group_baselines
from poise.orchestrator.algorithms.algorithm import Algorithm, AlgorithmOptions, AskProbe
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines, centred, lengths_of


class DapoOptions(AlgorithmOptions):
    """DAPO: GRPO on groups of unequal rewards alone; others are dropped, and more are sampled. The learner's defaults
    are its clip-higher and token mean."""

    kind: Literal["dapo"] = "dapo"
    """This algorithm."""
    max_draws: int = Field(4, ge=1, le=64)
    """How many times a step may draw its prompts to fill up with groups of unequal rewards; it then trains on those it
    has. 1 draws once."""
    overlong_margin_tokens: int = Field(0, ge=0)
    """The last so many tokens before `sampling.max_tokens` cost reward, linearly, up to 1 at the end; 0: none do."""
    std_normalisation: bool = True
    """Divide by the standard deviation of the group's rewards."""

    def make(self, max_tokens: int) -> Algorithm:
        """See `AlgorithmOptions`."""
        return Dapo(self, max_tokens)


class Dapo(Algorithm):
    """Keeps what teaches."""

    def __init__(self, options: DapoOptions, max_tokens: int) -> None:
        self._options = options
        self._max_tokens = max_tokens
        self.max_draws = options.max_draws

    def keeps(self, group: ScoredGroup) -> bool:
        """See `Algorithm`: whether its rewards, before shaping, differ."""
        return bool(group.rewards.min() < group.rewards.max())

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        """See `Algorithm`."""
        margin = min(self._options.overlong_margin_tokens, self._max_tokens)
        penalties = None
        if margin:
            penalties = [group_baselines.overlong_penalty(n, self._max_tokens, margin) for n in lengths_of(scored)]
        shaped = [item.rewards if penalties is None else item.rewards + penalties[i] for i, item in enumerate(scored)]
        centring = group_baselines.group_mean(shaped, divide=self._options.std_normalisation)
        return centred(scored, "group", centring, penalties)
