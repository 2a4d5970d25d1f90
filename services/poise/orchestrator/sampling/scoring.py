"""Samples groups for problems and scores their responses with verifiers, for training and for evaluation."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from poise.orchestrator.callbacks import PhaseTimer
from poise.orchestrator.config import EvaluationConfig, OrchestratorConfig, SamplingConfig
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.load_balancer import RejectedPrompt
from poise.orchestrator.sampling.scored_groups import ScoredGroup
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Group, Prompt, Sampling

logger = logging.getLogger(__name__)

_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ScoredProblems:
    """The result of sampling and scoring problems."""

    groups: list[ScoredGroup]
    num_errors: int
    """Rollouts on which the verifier failed."""
    rejected: list[tuple[Problem, str]]
    """Problems whose prompts generation rejects, and why."""


class Scorer:
    """Samples groups from generation and scores them with verifiers."""

    def __init__(self, services: ServiceClients, verifiers: VerifierPool) -> None:
        self._services = services
        self._verifiers = verifiers

    async def score(
        self,
        run_id: str,
        step: int,
        problems: Sequence[Problem],
        num_rollouts: int,
        sampling: Sampling,
        policy_version: int,
        timer: PhaseTimer,
        first_group: int = 0,
    ) -> ScoredProblems:
        """Return the groups in the order of `problems`, without rejected prompts, which are logged.

        Group ids are numbers from `first_group` on.
        """
        prompts = [
            Prompt(
                f"{first_group + index:05d}",
                problem.prompt if isinstance(problem.prompt, str) else list(problem.prompt),
            )
            for index, problem in enumerate(problems)
        ]
        verifying: dict[int, asyncio.Task[tuple[ScoredGroup, int]]] = {}
        reasons: dict[int, str] = {}
        try:
            with timer("generate"):
                groups = self._services.sample(run_id, step, prompts, num_rollouts, sampling, policy_version)
                async with contextlib.aclosing(groups):
                    async for group in groups:
                        index = int(group.group_id) - first_group
                        if isinstance(group, RejectedPrompt):
                            reasons[index] = group.reason
                        else:
                            verifying[index] = asyncio.create_task(self._verify(problems[index], group))
                        timer.on_sampled(len(verifying) + len(reasons), len(problems))
            with timer("verify"):
                verified = [await verifying[index] for index in sorted(verifying)]
        finally:
            for task in verifying.values():
                task.cancel()
        rejected = [(problems[index], reasons[index]) for index in sorted(reasons)]
        _log_rejected(rejected)
        return ScoredProblems([group for group, _ in verified], sum(errors for _, errors in verified), rejected)

    async def _verify(self, problem: Problem, group: Group) -> tuple[ScoredGroup, int]:
        verdicts = await asyncio.gather(
            *(self._verifiers.verify(problem, r.text, r.finish_reason) for r in group.rollouts)
        )
        rewards = np.array([verdict.reward for verdict in verdicts], np.float32)
        return ScoredGroup(group, problem, rewards), sum(verdict.error is not None for verdict in verdicts)


def _log_rejected(rejected: Sequence[tuple[Problem, str]]) -> None:
    for problem, reason in rejected[:_MAX_SHOWN]:
        logger.warning("%s: skipped because generation rejects the prompt: %s", problem.origin, reason)
    if len(rejected) > _MAX_SHOWN:
        logger.warning("%d prompts were rejected, showing the first %d", len(rejected), _MAX_SHOWN)


def sampling_options(config: OrchestratorConfig, section: SamplingConfig | EvaluationConfig, seed: int) -> Sampling:
    """Return the options of a sampling request, with the temperature and top-p of `section`."""
    return Sampling(
        temperature=section.temperature,
        top_p=section.top_p,
        max_tokens=config.sampling.max_tokens,
        stop=config.sampling.stop,
        stop_token_ids=config.sampling.stop_token_ids,
        seed=seed,
    )


def sampling_seed(seed: int, purpose: str, draw: int) -> int:
    """Return the seed of a draw's rollouts. It depends only on the run's seed, the purpose and the draw."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
