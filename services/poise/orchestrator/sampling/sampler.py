"""Samples the prompts of a step until the algorithm has enough groups to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from poise.orchestrator.algorithms.algorithm import Algorithm
from poise.orchestrator.callbacks import PhaseTimer
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.sampling.scored_groups import ScoredGroup
from poise.orchestrator.sampling.scoring import Scorer, sampling_options, sampling_seed
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem

_MAX_REPLACEMENTS = 8
"""Maximum number of times that rejected prompts of a draw are replaced by other prompts."""


@dataclass(slots=True)
class SampledStep:
    """The groups of a step, over all its draws."""

    sampled: list[ScoredGroup] = field(default_factory=list)
    kept: list[ScoredGroup] = field(default_factory=list)
    """Groups to train on."""
    num_filtered: int = 0
    """Groups that the algorithm dropped."""
    num_draws: int = 0
    num_problems: int = 0
    num_errors: int = 0
    """Rollouts on which the verifier failed."""
    rejected: list[tuple[Problem, str]] = field(default_factory=list)
    """Problems whose prompts generation rejects, and why."""


class StepSampler:
    """Samples the steps of one run, in order."""

    def __init__(self, config: OrchestratorConfig, mixture: Mixture, scorer: Scorer, algorithm: Algorithm) -> None:
        self._config = config
        self._mixture = mixture
        self._scorer = scorer
        self._algorithm = algorithm
        self._num_extra_draws = 0
        """Draws after the first of each step, over all steps so far."""

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue after `step`, from the state that was stored with it.

        Older releases did not store the positions of the tasks. Then `num_problems` is the number of problems drawn.
        """
        num_draws = state.get("num_draws", 1)
        first_draw = step + self._num_extra_draws
        num_drawn = state.get("num_drawn", state.get("given"))  # `given` in older releases
        if num_drawn is not None:
            self._mixture.resume(first_draw + num_draws, num_drawn)
        elif num_problems := state.get("num_problems"):
            for draw in range(first_draw, first_draw + num_draws):
                self._mixture.skip(draw, num_problems // num_draws)
        self._num_extra_draws += num_draws - 1

    async def sample(self, step: int, policy_version: int, timer: PhaseTimer) -> tuple[SampledStep, dict[str, Any]]:
        """Sample and score a step from `policy_version` or newer; return it and the state to `resume` after it.

        Draws until there are enough groups that the algorithm keeps, at most its `max_draws` times. If it keeps none,
        the groups of the last draw are returned; they train nothing.

        Raises:
            SettingsError: generation rejects all prompts of the step.
        """
        found, wanted = SampledStep(), self._config.prompts_per_step
        for _ in range(self._algorithm.max_draws):
            await self._draw(found, step, policy_version, timer)
            if len(found.kept) >= wanted:
                break
        if not found.sampled:
            problem, reason = found.rejected[-1]
            raise SettingsError(
                f"step {step}: generation rejects all {len(found.rejected)} prompts of the step. The last one, from "
                f"{problem.origin}: {reason}"
            )
        found.num_filtered = len(found.sampled) - len(found.kept)
        found.kept = found.kept[:wanted] or found.sampled[-wanted:]
        num_drawn = self._mixture.num_drawn(step + self._num_extra_draws + found.num_draws)
        self._num_extra_draws += found.num_draws - 1
        return found, {"num_draws": found.num_draws, "num_drawn": num_drawn}

    async def _draw(self, found: SampledStep, step: int, policy_version: int, timer: PhaseTimer) -> None:
        """Sample `prompts_per_step` problems, and others in place of rejected ones."""
        config, missing = self._config, self._config.prompts_per_step
        for _ in range(1 + _MAX_REPLACEMENTS):
            # Draws are numbered over the whole run, including the extra draws of earlier steps.
            draw = step + self._num_extra_draws + found.num_draws
            problems = self._mixture.problems(draw, missing)
            sampling = sampling_options(config, config.sampling, sampling_seed(config.seed, "train", draw))
            scored = await self._scorer.score(
                config.run_id, step, problems, config.group_size, sampling, policy_version, timer, found.num_problems
            )
            found.sampled += scored.groups
            found.kept += [group for group in scored.groups if self._algorithm.keeps(group)]
            found.num_draws += 1
            found.num_problems += missing
            found.num_errors += scored.num_errors
            found.rejected += scored.rejected
            missing = len(scored.rejected)
            if not missing:
                break
