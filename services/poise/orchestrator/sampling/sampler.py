"""A training step up to its journal: sampled, verified, valued, and on disk before any of it leaves.

Owns that order. Knows neither the learner nor the labels' way to the probe.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from poise.orchestrator.algorithms.algorithm import Memory
from poise.orchestrator.callbacks import Phases, RunClock, Watcher
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.sampling.scoring import Scorer, sampling_seed
from poise.orchestrator.sampling.service_clients import Services
from poise.orchestrator.sampling.step_arithmetic import (
    ScoredGroup,
    StepBaselines,
    labelled_groups,
    training_batch,
)
from poise.orchestrator.step_metrics import predictions, step_numbers
from poise.orchestrator.storage.disk_retry import Storage
from poise.orchestrator.storage.step_journal import JournalledStep, StepJournal
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise_client.errors import LabelsConsumedError
from poise_client.types import GroupBaselines, Sampling

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 8
"""How many times a draw takes other prompts in place of rejected ones."""


@dataclass(slots=True)
class _Drawn:
    """What a step sampled, over all its draws."""

    sampled: list[ScoredGroup] = field(default_factory=list)
    kept: list[ScoredGroup] = field(default_factory=list)
    """What is trained on."""
    num_filtered: int = 0
    """Groups that the algorithm does not keep."""
    problems: dict[str, Problem] = field(default_factory=dict)
    """By group id."""
    num_draws: int = 0
    num_rounds: int = 0
    """Draws of `prompts_per_step` problems, each with those that replace rejected ones."""
    num_problems: int = 0
    num_errors: int = 0
    """Rollouts that could not be verified."""
    rejected: list[tuple[Problem, str]] = field(default_factory=list)
    """Problems that generation does not take, and why."""


class StepSampler:
    """Makes the steps of one run, one after the other."""

    def __init__(
        self,
        config: OrchestratorConfig,
        journal: StepJournal,
        services: Services,
        mixture: Mixture,
        scorer: Scorer,
        watcher: Watcher,
        storage: Storage | None = None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._services = services
        self._mixture = mixture
        self._scorer = scorer
        self._watcher = watcher
        self._storage = storage or Storage()
        self._algorithm = config.algorithm.make(config.sampling.max_tokens)
        self._num_extra_draws = 0
        """Before the next draw: draws of prompts beyond one a step."""
        self._settled = True
        """Whether the probe was, when it was last waited for."""

    def recall(self, memories: Iterable[Memory]) -> None:
        """Take up what the steps before remembered, in their order: each's `step` and memory.

        One that does not say what its tasks gave was written by an older version: `num_problems` says how many it drew.
        """
        for memory in memories:
            num_draws = memory.get("num_draws", 1)
            first_draw = memory["step"] + self._num_extra_draws
            if "given" in memory:
                self._mixture.resume(first_draw + num_draws, memory["given"])
            elif num_problems := memory.get("num_problems"):
                for draw in range(first_draw, first_draw + num_draws):
                    self._mixture.pass_over(draw, num_problems // num_draws)
            self._num_extra_draws += num_draws - 1
            self._algorithm.recall(memory)

    async def sample(self, step: int, policy_version: int, num_ahead: int, clock: RunClock) -> JournalledStep:
        """Sample a step from `policy_version` or newer, verify and value it, and journal all of it.

        `num_ahead` is how many steps before it the learner has yet to train on.

        Raises:
            SettingsError: the probe has learnt from a step of this name before.
            SettingsError: generation rejects all that is drawn.
        """
        config = self._config
        phases = Phases(self._watcher, step)
        drawn = await self._draw(step, policy_version, phases)
        scored = drawn.kept
        with phases("baselines"):
            baselines = await self._algorithm.baselines(scored, lambda: self._ask_probe(step, scored))
        numbers: dict[str, Any] = {"step": step, "algorithm": config.algorithm.kind}
        numbers |= step_numbers(drawn.sampled, scored, baselines, policy_version)
        generate_s = phases.seconds["generate"]
        numbers |= {
            "steps_ahead": num_ahead,
            "num_draws": drawn.num_draws,
            "num_rejected_prompts": len(drawn.rejected),
            "num_filtered_groups": drawn.num_filtered,
            "verifier_errors": drawn.num_errors,
            "tokens_per_s": numbers["response_tokens"]["total"] / generate_s if generate_s else 0.0,
        }
        predicted, realised, domains = predictions(scored, baselines)
        memory = {
            **self._algorithm.remember(scored),
            "num_draws": drawn.num_draws,
            "given": self._mixture.given(step + self._num_extra_draws + drawn.num_draws),
        }
        with phases("journal"):
            numbers["time_s"] = phases.seconds
            journalled = JournalledStep(
                step=step,
                labels=labelled_groups(scored) if config.algorithm.needs_probe else [],
                batch=training_batch(config.run_id, step, scored, baselines, config.sampling.temperature),
                numbers=numbers,
                values={"step": step, "predicted": predicted, "realised": realised, "domain": domains},
                samples=self._samples(step, drawn.problems, scored, baselines),
                memory=memory,
            )
            # The time of all this counts although the process may die before the step is finished.
            numbers["wall_s"] = clock.now_s()
            await self._storage.keep(partial(self._journal.write, journalled))
        self._num_extra_draws += drawn.num_draws - 1
        self._algorithm.recall(memory)
        return journalled

    async def _draw(self, step: int, policy_version: int, phases: Phases) -> _Drawn:
        """Sample and verify the step's prompts, and others until there are enough groups that the algorithm keeps.

        If none of the possible draws is kept, return the groups of the last one: they train nothing.
        """
        drawn, wanted = _Drawn(), self._config.prompts_per_step
        while drawn.num_rounds < self._algorithm.max_draws and len(drawn.kept) < wanted:
            await self._draw_round(drawn, step, policy_version, phases)
        if not drawn.sampled:
            problem, reason = drawn.rejected[-1]
            raise SettingsError(
                f"step {step}: generation rejects all {len(drawn.rejected)} prompts of the step. The last one, from "
                f"{problem.origin}: {reason}"
            )
        drawn.num_filtered = len(drawn.sampled) - len(drawn.kept)
        drawn.kept = drawn.kept[:wanted] or drawn.sampled[-wanted:]
        return drawn

    async def _draw_round(self, drawn: _Drawn, step: int, policy_version: int, phases: Phases) -> None:
        """Sample and verify `prompts_per_step` prompts, with others in place of those that generation rejects."""
        missing = self._config.prompts_per_step
        for _ in range(1 + _MAX_REPLACEMENTS):
            num_rejected = len(drawn.rejected)
            await self._draw_once(drawn, step, missing, policy_version, phases)
            missing = len(drawn.rejected) - num_rejected
            if not missing:
                break
        drawn.num_rounds += 1

    async def _draw_once(self, drawn: _Drawn, step: int, num: int, policy_version: int, phases: Phases) -> None:
        # Draws are numbered over the whole run, including the additional draws of earlier steps.
        config, draw = self._config, step + self._num_extra_draws + drawn.num_draws
        problems = self._mixture.problems(draw, num)
        sampling = Sampling(
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_tokens=config.sampling.max_tokens,
            stop=config.sampling.stop,
            stop_token_ids=config.sampling.stop_token_ids,
            seed=sampling_seed(config.seed, "train", draw),
        )
        scored = await self._scorer.score(
            config.run_id, step, problems, config.group_size, sampling, policy_version, phases, drawn.num_problems
        )
        drawn.sampled += scored.groups
        drawn.kept += [item for item in scored.groups if self._algorithm.keeps(item)]
        for item, problem in zip(scored.groups, scored.problems, strict=True):
            drawn.problems[item.group.group_id] = problem
        drawn.num_draws += 1
        drawn.num_problems += num
        drawn.num_errors += scored.num_errors
        drawn.rejected += scored.rejected

    async def _ask_probe(self, step: int, scored: Sequence[ScoredGroup]) -> list[GroupBaselines]:
        """Ask for the step's baselines, and wait for the probe where steps come one after the other.

        Where they are sampled ahead, waiting would make nothing repeatable: which labels are published before a step is
        valued follows from how fast the learner was.
        """
        config = self._config
        wait_for_labels_s = config.settle_probe_s if config.max_staleness == 0 else 0.0
        try:
            answers = await self._services.estimate_baselines(
                config.run_id, step, labelled_groups(scored), wait_for_labels_s
            )
        except LabelsConsumedError as error:
            raise SettingsError(
                f"the value service has learnt from step {step} of run {self._config.run_id!r} before: the name was "
                "used by another run. Give this run another run_id"
            ) from error
        if wait_for_labels_s:
            self._say_settled(step, all(answer.up_to_date for answer in answers))
        return answers

    def _say_settled(self, step: int, settled: bool) -> None:
        """Log changes only."""
        if self._settled and not settled:
            logger.warning(
                "step %d was valued by a probe that may lack labels of the steps before, for it was not fitted on them "
                "within settle_probe_s = %g (is consuming paused, the queue down, or a fit failed?): the run is as "
                "sound, but the same run again may differ",
                step,
                self._config.settle_probe_s,
            )
        elif settled and not self._settled:
            logger.info("step %d was valued by a probe fitted on all labels before it again", step)
        self._settled = settled

    def _samples(
        self, step: int, problems: Mapping[str, Problem], scored: Sequence[ScoredGroup], baselines: StepBaselines
    ) -> list[dict[str, Any]]:
        lines = []
        for index in range(min(self._config.samples_per_step, len(scored))):
            item, values_n = scored[index], baselines.value(index)
            problem = problems[item.group.group_id]
            advantages_n = baselines.advantages(index, item.rewards)
            for sibling, rollout in enumerate(item.group.rollouts):
                lines.append(
                    {
                        "step": step,
                        "group_id": item.group.group_id,
                        "domain": item.domain,
                        "prompt": _readable(problem),
                        "answer": problem.answer,
                        "response": rollout.text,
                        "reward": float(item.rewards[sibling]),
                        "value": None if values_n is None else float(values_n[sibling]),
                        "advantage": None if baselines.by_critic else float(advantages_n[sibling]),
                    }
                )
        return lines


def _readable(problem: Problem) -> str:
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in problem.prompt)
