"""Problems become groups of rollouts with rewards: sampled by generation, checked by verifiers as they come in.

Used for training and for evaluations alike. Knows no baselines and no files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence

import numpy as np

from poise.orchestrator.services import Services
from poise.orchestrator.step import ScoredGroup
from poise.orchestrator.tasks.problem import Problem
from poise.orchestrator.verifiers.pool import VerifierPool
from poise.orchestrator.watcher import Phases
from poise_client.types import Group, Prompt, Sampling


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
    ) -> tuple[list[ScoredGroup], int]:
        """Return the groups in the order of `problems`, and how many rollouts could not be verified.

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
        try:
            with phases("generate"):
                groups = self._services.sample(run_id, step, prompts, num_rollouts, sampling, policy_version)
                async with contextlib.aclosing(groups):
                    async for group in groups:
                        index = int(group.group_id) - first_group
                        verifying[index] = asyncio.create_task(self._verify(problems[index], group))
                        phases.sampled(len(verifying), len(problems))
            with phases("verify"):
                verified = [await verifying[index] for index in range(len(problems))]
        finally:
            for task in verifying.values():
                task.cancel()
        return [scored for scored, _ in verified], sum(errors for _, errors in verified)

    async def _verify(self, problem: Problem, group: Group) -> tuple[ScoredGroup, int]:
        verdicts = await asyncio.gather(
            *(self._verifiers.verify(problem, r.text, r.finish_reason) for r in group.rollouts)
        )
        rewards = np.array([verdict.reward for verdict in verdicts], np.float32)
        scored = ScoredGroup(group, problem.domain, rewards, problem.prompt_key)
        return scored, sum(verdict.error is not None for verdict in verdicts)


def sampling_seed(seed: int, purpose: str, step: int) -> int:
    """Return the seed of a step's rollouts: it follows from the run's seed, the purpose and the step alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
