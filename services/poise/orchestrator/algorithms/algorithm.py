"""The interface of an algorithm: the groups it keeps, its baselines, and its state between steps.

To add one, write a module with its options and a subclass of `Algorithm`, and add the options to `registry`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines
from poise.runtime.config.settings import StrictModel
from poise_client.types import GroupBaselines

EstimateBaselines = Callable[[], Awaitable[Sequence[GroupBaselines]]]
"""Requests the baselines of the step's groups, in their order, from the value service."""

State = Mapping[str, Any]
"""JSON values that one step adds to an algorithm's state."""


class Algorithm:
    """An algorithm of one run. The loop calls it once for each step, in order."""

    max_draws: int = 1
    """Maximum number of times that a step draws prompts to get enough groups that `keeps` accepts."""

    def keeps(self, group: ScoredGroup) -> bool:
        """Return whether to train on a group. The tokens of other groups still count toward the budget."""
        return True

    async def baselines(self, groups: Sequence[ScoredGroup], estimate: EstimateBaselines) -> StepBaselines:
        """Return the baselines of a step's groups. No label of the step has been published at this point."""
        raise NotImplementedError

    def step_state(self, groups: Sequence[ScoredGroup]) -> State:
        """Return the state that later steps need from this step. The loop stores it with the step."""
        return {}

    def load_step_state(self, state: State) -> None:
        """Apply the result of `step_state`. The loop calls it for each step, in order, and again when it resumes."""


class AlgorithmOptions(StrictModel):
    """Options of an algorithm. `kind` is its name."""

    needs_probe: ClassVar[bool] = False
    """Whether baselines come from the value service, which then needs labels."""
    needs_critic: ClassVar[bool] = False
    """Whether the learner's critic computes the advantages from rewards."""

    @property
    def min_rollouts(self) -> int:
        """Minimum number of rollouts per prompt."""
        return 2

    @property
    def default_rollouts(self) -> int:
        """Default number of rollouts per prompt."""
        return 8

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of `poise.algorithms.baselines.BIASES` that apply."""
        return ()

    def problem(self, rollouts_per_prompt: int, prompts_per_step: int) -> str | None:
        """Return why the options do not work with these numbers, or None."""
        return None

    def make(self, max_tokens: int) -> Algorithm:
        """Return the algorithm, for responses of at most `max_tokens` tokens."""
        raise NotImplementedError

    def learner_settings(self, max_tokens: int) -> dict[str, Any]:
        """Return the learner's settings that belong to the algorithm and differ from the defaults."""
        return {}

    def value_settings(self) -> dict[str, Any]:
        """Return the value service's settings that belong to the algorithm."""
        return {}
