"""Problems become groups of rollouts with rewards: sampled by generation, checked by verifiers as they come in.

Used for training and for evaluations alike. Knows no baselines and no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from poise.orchestrator.callbacks import Phases
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.load_balancer import RejectedPrompt
from poise.orchestrator.sampling.service_clients import Services
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup
from poise.orchestrator.tasks.problem import Problem
from poise_client.types import Group, Prompt, Sampling

logger = logging.getLogger(__name__)

_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of problems."""

    groups: list[ScoredGroup]
    problems: list[Problem]
    """Of each group."""
    num_errors: int
    """Rollouts that could not be verified."""
    rejected: list[tuple[Problem, str]]
    """Problems that generation does not take, and why."""


class Scorer:
    """Samples and verifies."""

    def __init__(self, services: Services, verifiers: VerifierPool) -> None:
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
        phases: Phases,
        first_group: int = 0,
    ) -> Scored:
        """Return the groups in the order of `problems`, without those whose prompts are rejected; the log tells which.

        Groups are named by number, from `first_group` on.
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
            with phases("generate"):
                groups = self._services.sample(run_id, step, prompts, num_rollouts, sampling, policy_version)
                async with contextlib.aclosing(groups):
                    async for group in groups:
                        index = int(group.group_id) - first_group
                        if isinstance(group, RejectedPrompt):
                            reasons[index] = group.reason
                        else:
                            verifying[index] = asyncio.create_task(self._verify(problems[index], group))
                        phases.sampled(len(verifying) + len(reasons), len(problems))
            with phases("verify"):
                verified = [await verifying[index] for index in sorted(verifying)]
        finally:
            for task in verifying.values():
                task.cancel()
        rejected = [(problems[index], reasons[index]) for index in sorted(reasons)]
        _log_rejected(rejected)
        return Scored(
            [scored for scored, _ in verified],
            [problems[index] for index in sorted(verifying)],
            sum(errors for _, errors in verified),
            rejected,
        )

    async def _verify(self, problem: Problem, group: Group) -> tuple[ScoredGroup, int]:
        verdicts = await asyncio.gather(
            *(self._verifiers.verify(problem, r.text, r.finish_reason) for r in group.rollouts)
        )
        rewards = np.array([verdict.reward for verdict in verdicts], np.float32)
        scored = ScoredGroup(group, problem.domain, rewards, problem.prompt_key)
        return scored, sum(verdict.error is not None for verdict in verdicts)


def _log_rejected(rejected: Sequence[tuple[Problem, str]]) -> None:
    for problem, reason in rejected[:_MAX_SHOWN]:
        logger.warning("%s: left out, generation rejects the prompt: %s", problem.origin, reason)
    if len(rejected) > _MAX_SHOWN:
        logger.warning("%d prompts were rejected, showing the first %d", len(rejected), _MAX_SHOWN)


def sampling_seed(seed: int, purpose: str, step: int) -> int:
    """Return the seed of a step's rollouts: it follows from the run's seed, the purpose and the step alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
