"""What an algorithm is to the loop: which groups it keeps, what its advantages are, what it remembers.

Owns the interface alone. A new algorithm is a module with its options and a subclass of `Algorithm`, and the name of
its options in `registry`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines
from poise.runtime.config.settings import StrictModel
from poise_client.types import GroupBaselines

AskProbe = Callable[[], Awaitable[Sequence[GroupBaselines]]]
"""Asks the value service for the baselines of the step's groups, in their order."""

Memory = Mapping[str, Any]
"""JSON values: what a step adds to what an algorithm knows."""


class Algorithm:
    """One run's. Its methods are called step by step, in order; a resumed run `recall`s the steps before."""

    max_draws: int = 1
    """How many times a step may draw its prompts to have enough groups that it keeps."""

    def keeps(self, group: ScoredGroup) -> bool:
        """Whether a group is trained on. Those that are not were sampled for nothing, and count as sampled."""
        return True

    async def baselines(self, scored: Sequence[ScoredGroup], ask_probe: AskProbe) -> StepBaselines:
        """Return the baselines of a step's groups, from what is known before any label of it has left."""
        raise NotImplementedError

    def remember(self, scored: Sequence[ScoredGroup]) -> Memory:
        """Return what is to be known of this step from the next one on; it is kept with the step."""
        return {}

    def recall(self, memory: Memory) -> None:
        """Take up what `remember` gave: once for each step, in order."""


class AlgorithmOptions(StrictModel):
    """Options of one algorithm. A subclass names it by `kind`."""

    min_rollouts: ClassVar[int] = 2
    """Rollouts of a prompt that it needs at least."""
    needs_probe: ClassVar[bool] = False
    """Whether the value service is asked, and told the labels."""
    needs_critic: ClassVar[bool] = False
    """Whether the learner's critic makes the advantages: it is sent rewards."""
    usual_rollouts: ClassVar[int] = 8
    """Rollouts of a prompt that it is used with."""

    def make(self, max_tokens: int) -> Algorithm:
        """Return the algorithm, for responses of at most `max_tokens` tokens."""
        raise NotImplementedError

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """Return the settings of the learner that belong to it, where they are not the learner's defaults."""
        return {}
