"""Measuring the policy on prompts it never trains on, once each time that it is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from poise.orchestrator.budget import Spent, passes_multiple
from poise.orchestrator.callbacks import Phases, Watcher
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.sampling.scoring import Scorer, sampling_seed
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup
from poise.orchestrator.storage.disk_retry import Storage
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.report.scores import score_table
from poise_client.types import Sampling

EVALUATION_SUFFIX = ":evaluation"
"""Rollouts of evaluations belong to a run of their own name: none of them can be taken for training data."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of an evaluation."""

    line: dict[str, Any]
    """A line of evaluations.jsonl."""
    problems: Sequence[Problem]
    scored: Sequence[ScoredGroup]
    """Of each problem."""

    def generations(self) -> Iterator[dict[str, Any]]:
        """Yield a line of every rollout: what was asked, what was answered, and what that was worth."""
        for index, (problem, item) in enumerate(zip(self.problems, self.scored, strict=True)):
            for rollout, reward in zip(item.group.rollouts, item.rewards.tolist(), strict=True):
                yield {
                    "when": self.line["when"],
                    "step": self.line["step"],
                    "policy_versions": sorted({span.policy_version for span in rollout.version_spans}),
                    "prompt_index": index,
                    "rollout_index": rollout.id.rollout_index,
                    "task": problem.task,
                    "domain": problem.domain,
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "response": rollout.text,
                    "reward": reward,
                    "finish_reason": rollout.finish_reason,
                    "num_tokens": int(rollout.token_ids.size),
                }


class Evaluator:
    """Measures one run's policy."""

    def __init__(
        self,
        config: OrchestratorConfig,
        folder: RunFolder,
        mixture: Mixture,
        scorer: Scorer,
        watcher: Watcher,
        storage: Storage | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._mixture = mixture
        self._scorer = scorer
        self._watcher = watcher
        self._storage = storage or Storage()

    async def due(self, spent: Spent) -> str | None:
        """Return as what the policy that the steps so far made is to be measured; None where it is not."""
        return await self._storage.keep(partial(self._due, spent))

    def _due(self, spent: Spent) -> str | None:
        step = spent.num_steps
        when = "before" if step == 0 else "step" if self._is_time(spent) else None
        return None if when is None or self._is_settled(when, step) else when

    async def evaluate(self, when: str, spent: Spent, policy_version: int) -> None:
        """Measure the policy that so much was spent on and write it down, unless it was done or is not asked for."""
        step = spent.num_steps
        if await self._storage.keep(partial(self._is_settled, when, step)):
            return
        measurement = await self.measure(when, step, policy_version)
        line = measurement.line | {"tokens": spent.tokens, "wall_s": spent.wall_s}
        await self._storage.keep(lambda: self._folder.write_evaluation(line, measurement.generations()))
        self._watcher.evaluated(line)

    async def measure(self, when: str, step: int, policy_version: int) -> Measurement:
        """Sample the held-out prompts from what serves at least `policy_version`, and reward the responses."""
        config = self._config.evaluation
        problems = self._mixture.held_out(config.num_prompts)
        sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=self._config.sampling.max_tokens,
            stop=self._config.sampling.stop,
            stop_token_ids=self._config.sampling.stop_token_ids,
            seed=sampling_seed(self._config.seed, "evaluation", 0),
        )
        phases = Phases(self._watcher, step)
        found = await self._scorer.score(
            self._config.run_id + EVALUATION_SUFFIX,
            step,
            problems,
            config.rollouts_per_prompt,
            sampling,
            policy_version,
            phases,
        )
        problems, scored = found.problems, found.groups
        if not scored:
            problem, reason = found.rejected[-1]
            raise SettingsError(f"generation rejects all held-out prompts, the last, of {problem.origin}: {reason}")
        by_domain: dict[str, list[float]] = {}
        for item in scored:
            by_domain.setdefault(item.domain, []).append(float(item.rewards.mean()))
        rewards = [item.rewards.tolist() for item in scored]
        domains, tasks = [problem.domain for problem in problems], [problem.task for problem in problems]
        line = {
            "when": when,
            "step": step,
            "policy_version": policy_version,
            "num_prompts": len(problems),
            "rollouts_per_prompt": config.rollouts_per_prompt,
            "sampling": asdict(sampling),
            "pass_threshold": config.pass_threshold,
            "scores": score_table(rewards, domains, tasks, config.pass_threshold),
            "rewards": rewards,
            "by_domain": {name: float(np.mean(means)) for name, means in sorted(by_domain.items())},
            "num_rejected_prompts": len(found.rejected),
            "verifier_errors": found.num_errors,
            "seconds": sum(phases.seconds.values()),
        }
        return Measurement(line, problems, scored)

    def _is_time(self, spent: Spent) -> bool:
        config = self._config.evaluation
        if config.every_steps and spent.num_steps % config.every_steps == 0:
            return True
        if not config.every_tokens and not config.every_wall_s:
            return False
        last = self._folder.last_evaluated()
        return passes_multiple(config.every_tokens, last.tokens, spent.tokens) or passes_multiple(
            config.every_wall_s, last.wall_s, spent.wall_s
        )

    def _is_settled(self, when: str, step: int) -> bool:
        return not self._config.evaluation.num_prompts or self._folder.evaluated(when, step)
