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
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError
from poise.orchestrator.numbers import predictions, step_numbers
from poise.orchestrator.scoring import Scorer, sampling_seed
from poise.orchestrator.services import Services
from poise.orchestrator.step import (
    ScoredGroup,
    StepBaselines,
    group_features,
    labelled_groups,
    training_batch,
)
from poise.orchestrator.step_journal import JournalledStep, StepJournal
from poise.orchestrator.storage import Storage
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.orchestrator.watcher import Phases, RunClock, Watcher
from poise_client.errors import LabelsConsumedError
from poise_client.types import GroupBaselines, Sampling

logger = logging.getLogger(__name__)


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
    num_errors: int = 0
    """Rollouts that could not be verified."""


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
        """Before the next step: draws of prompts beyond one a step."""
        self._settled = True
        """Whether the probe was, when it was last waited for."""

    def recall(self, memories: Iterable[Memory]) -> None:
        """Take up what the steps before remembered, in their order."""
        for memory in memories:
            self._num_extra_draws += memory.get("num_draws", 1) - 1
            self._algorithm.recall(memory)

    async def sample(self, step: int, policy_version: int, num_ahead: int, clock: RunClock) -> JournalledStep:
        """Sample a step from `policy_version` or newer, verify and value it, and journal all of it.

        `num_ahead` is how many steps before it the learner has yet to train on.

        Raises:
            RunError: the probe has learnt from a step of this name before.
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
            "num_filtered_groups": drawn.num_filtered,
            "verifier_errors": drawn.num_errors,
            "tokens_per_s": numbers["response_tokens"]["total"] / generate_s if generate_s else 0.0,
        }
        predicted, realised, domains = predictions(scored, baselines)
        with phases("journal"):
            numbers["time_s"] = phases.seconds
            journalled = JournalledStep(
                step=step,
                labels=labelled_groups(config.run_id, step, scored) if config.algorithm.needs_probe else [],
                batch=training_batch(config.run_id, step, scored, baselines, config.sampling.temperature),
                numbers=numbers,
                values={"step": step, "predicted": predicted, "realised": realised, "domain": domains},
                samples=self._samples(step, drawn.problems, scored, baselines),
                memory={**self._algorithm.remember(scored), "num_draws": drawn.num_draws},
            )
            # The time of all this counts although the process may die before the step is finished.
            numbers["wall_s"] = clock.now_s()
            await self._storage.keep(partial(self._journal.write, journalled))
        self.recall([journalled.memory])
        return journalled

    async def _draw(self, step: int, policy_version: int, phases: Phases) -> _Drawn:
        """Sample and verify the step's prompts, and others until there are enough groups that the algorithm keeps.

        Where none is kept of all that may be drawn, those of the last draw are: they teach nothing; the run goes on.
        """
        config, drawn = self._config, _Drawn()
        wanted = config.prompts_per_step
        while drawn.num_draws < self._algorithm.max_draws and len(drawn.kept) < wanted:
            # Prompts are numbered by draws: a run that drew more for a step before goes on after those.
            number = step + self._num_extra_draws + drawn.num_draws
            problems = self._mixture.problems(number, wanted)
            first = wanted * drawn.num_draws
            sampling = Sampling(
                temperature=config.sampling.temperature,
                top_p=config.sampling.top_p,
                max_tokens=config.sampling.max_tokens,
                stop=config.sampling.stop,
                seed=sampling_seed(config.seed, "train", number),
            )
            scored, num_errors = await self._scorer.score(
                config.run_id, step, problems, config.group_size, sampling, policy_version, phases, first
            )
            drawn.sampled += scored
            drawn.kept += [item for item in scored if self._algorithm.keeps(item)]
            drawn.problems |= {item.group.group_id: each for item, each in zip(scored, problems, strict=True)}
            drawn.num_draws += 1
            drawn.num_errors += num_errors
        drawn.num_filtered = len(drawn.sampled) - len(drawn.kept)
        drawn.kept = drawn.kept[:wanted] or drawn.sampled[-wanted:]
        return drawn

    async def _ask_probe(self, step: int, scored: Sequence[ScoredGroup]) -> list[GroupBaselines]:
        """Ask for the step's baselines, and wait for the probe where steps come one after the other.

        Where they are sampled ahead, waiting would make nothing repeatable: which labels are published before a step is
        valued follows from how fast the learner was.
        """
        config = self._config
        settle_s = config.settle_probe_s if config.max_staleness == 0 else 0.0
        try:
            answers = await self._services.estimate_baselines(config.run_id, step, group_features(scored), settle_s)
        except LabelsConsumedError as error:
            raise RunError(
                f"the value service has learnt from step {step} of run {self._config.run_id!r} before: the name was "
                "used by another run. Give this run another run_id"
            ) from error
        if settle_s:
            self._say_settled(step, all(answer.settled for answer in answers))
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
