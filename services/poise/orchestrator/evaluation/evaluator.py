"""Evaluation of a run's policy on held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from poise.orchestrator.budget import Usage, passes_multiple
from poise.orchestrator.callbacks import Callbacks, PhaseTimer
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import SettingsError
from poise.orchestrator.sampling.scored_groups import ScoredGroup
from poise.orchestrator.sampling.scoring import Scorer, sampling_options, sampling_seed
from poise.orchestrator.storage.disk_retry import DiskRetry
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.mixture import Mixture
from poise.report.scores import score_table

EVALUATION_SUFFIX = ":evaluation"
"""Suffix of the run id of evaluation rollouts, which separates them from training rollouts."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation."""

    line: dict[str, Any]
    """Its line of evaluations.jsonl."""
    groups: list[ScoredGroup]

    def generations(self) -> Iterator[dict[str, Any]]:
        """Yield a line for every rollout: prompt, response, reward."""
        for index, item in enumerate(self.groups):
            problem = item.problem
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
    """Evaluates the policy of one run when it is due."""

    def __init__(
        self,
        config: OrchestratorConfig,
        folder: RunFolder,
        mixture: Mixture,
        scorer: Scorer,
        callbacks: Callbacks,
        disk: DiskRetry | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._mixture = mixture
        self._scorer = scorer
        self._callbacks = callbacks
        self._disk = disk or DiskRetry()

    async def due(self, usage: Usage) -> str | None:
        """Return `before` or `step` if an evaluation is due at this point; None if not."""
        return await self._disk.run(partial(self._due, usage))

    async def evaluate(self, when: str, usage: Usage, policy_version: int) -> None:
        """Evaluate the policy and write the result. Do nothing if it is already written or evaluation is off."""
        step = usage.num_steps
        if not await self._disk.run(partial(self._is_missing, when, step)):
            return
        evaluation = await self.measure(when, step, policy_version)
        line = evaluation.line | {"tokens": usage.tokens, "wall_s": usage.wall_s}
        await self._disk.run(lambda: self._folder.write_evaluation(line, evaluation.generations()))
        self._callbacks.on_evaluation_end(line)

    async def measure(self, when: str, step: int, policy_version: int) -> Evaluation:
        """Sample and score the held-out prompts, from replicas that serve at least `policy_version`."""
        config = self._config.evaluation
        sampling = sampling_options(self._config, config, sampling_seed(self._config.seed, "evaluation", 0))
        timer = PhaseTimer(self._callbacks, step)
        num_rollouts = (config.final_rollouts_per_prompt if when == "after" else None) or config.rollouts_per_prompt
        scored = await self._scorer.score(
            self._config.run_id + EVALUATION_SUFFIX,
            step,
            self._mixture.held_out(config.num_prompts),
            num_rollouts,
            sampling,
            policy_version,
            timer,
        )
        groups = scored.groups
        if not groups:
            problem, reason = scored.rejected[-1]
            raise SettingsError(
                f"generation rejects all {len(scored.rejected)} held-out prompts. The last one, from {problem.origin}: "
                f"{reason}"
            )
        by_domain: dict[str, list[float]] = {}
        for item in groups:
            by_domain.setdefault(item.domain, []).append(float(item.rewards.mean()))
        rewards = [item.rewards.tolist() for item in groups]
        domains, tasks = [item.domain for item in groups], [item.problem.task for item in groups]
        line = {
            "when": when,
            "step": step,
            "policy_version": policy_version,
            "num_prompts": len(groups),
            "rollouts_per_prompt": num_rollouts,
            "sampling": asdict(sampling),
            "pass_threshold": config.pass_threshold,
            "scores": score_table(rewards, domains, tasks, config.pass_threshold),
            "rewards": rewards,
            "by_domain": {name: float(np.mean(means)) for name, means in sorted(by_domain.items())},
            "num_rejected_prompts": len(scored.rejected),
            "verifier_errors": scored.num_errors,
            "seconds": sum(timer.seconds.values()),
        }
        return Evaluation(line, groups)

    def _due(self, usage: Usage) -> str | None:
        step = usage.num_steps
        when = "before" if step == 0 else "step" if self._is_scheduled(usage) else None
        return when if when and self._is_missing(when, step) else None

    def _is_scheduled(self, usage: Usage) -> bool:
        config = self._config.evaluation
        if config.every_steps and usage.num_steps % config.every_steps == 0:
            return True
        if not config.every_tokens and not config.every_wall_s:
            return False
        last = self._folder.last_evaluated()
        return passes_multiple(config.every_tokens, last.tokens, usage.tokens) or passes_multiple(
            config.every_wall_s, last.wall_s, usage.wall_s
        )

    def _is_missing(self, when: str, step: int) -> bool:
        return self._config.evaluation.num_prompts > 0 and not self._folder.evaluated(when, step)
