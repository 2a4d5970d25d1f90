"""Scripted fakes of services, verifiers and the run folder. Their state outlives the orchestrator's process."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.rewards.pool import VerifierResult
from poise.orchestrator.sampling.load_balancer import RejectedPrompt
from poise.orchestrator.storage.run_folder import RunFolder, RunState
from poise.orchestrator.storage.step_journal import JournalledStep, StepJournal
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise_client.codec import dump_batch, dump_labels, load_batch, load_labels
from poise_client.errors import LabelsConsumedError
from poise_client.types import (
    Batch,
    Estimator,
    Features,
    Group,
    GroupBaselines,
    LearnerStatus,
    ProbeReport,
    Prompt,
    Rollout,
    RolloutId,
    Sampling,
    StepMetrics,
    StepResult,
    VersionSpan,
)


class Crash(BaseException):
    """A crash of the process. The code under test must not catch it."""


class World:
    """Everything outside the orchestrator. Each event is recorded, and may be the last before a crash."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.crash_at: int | None = None
        self.crashed = False
        self.version = 0
        self.max_staleness = 0
        self.has_critic = False
        self.aggregation = "constant"
        self.batches: dict[str, Batch] = {}
        self.ages: dict[str, Counter[int]] = {}
        self.mismatch_kl = 0.0
        """Of engine and learner, in every step."""
        self.slowness = 0
        """Milliseconds that the learner needs for a step, at least."""
        self.labels: dict[tuple[int, str], Group] = {}
        self.asked: list[tuple[str, int, tuple[Prompt, ...], int, Sampling, int]] = []
        self.probed = True
        self.estimator: Estimator = "probe"
        """The value service's estimator: "probe", "score_mean" or "score_prefix"."""
        self.domain_estimators: dict[str, Estimator] = {}
        self.wait_for_labels_s: list[float] = []
        """Longest wait of each baseline request."""
        self.behind: set[int] = set()
        """Steps at which the probe lacks labels."""
        self.shown: list[Any] = []
        self.rejected: set[str] = set()
        """Prompts that generation does not take."""

    def note(self, event: str) -> None:
        if self.crashed:
            raise Crash("the dead do nothing")
        self.events.append(event)
        if self.crash_at == len(self.events) - 1:
            self.crashed = True
            raise Crash(event)

    # Services

    async def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> AsyncGenerator[Group | RejectedPrompt, None]:
        assert self.version - self.max_staleness <= min_policy_version <= self.version
        self.asked.append((run_id, step, tuple(prompts), num_rollouts, sampling, min_policy_version))
        self.note(f"sample {run_id} {step}")
        for prompt in reversed(prompts):  # they finish in any order
            await asyncio.sleep(0)
            if str(prompt.content) in self.rejected:
                yield RejectedPrompt(prompt.group_id, "text: is too long")
                continue
            yield self._group(run_id, step, prompt, num_rollouts, sampling)

    def _group(self, run_id: str, step: int, prompt: Prompt, num_rollouts: int, sampling: Sampling) -> Group:
        rollouts = []
        for index in range(num_rollouts):
            digest = hashlib.sha256(f"{prompt.content}/{sampling.seed}/{index}/{self.version}".encode()).digest()
            length = 1 + digest[0] % 3
            rollouts.append(
                Rollout(
                    id=RolloutId(run_id, step, prompt.group_id, index),
                    prompt_token_ids=np.array([7], np.int32),
                    token_ids=np.frombuffer(digest[:length], np.uint8).astype(np.int32),
                    logprobs=np.full(length, -1.5, np.float32),
                    token_entropies=np.full(length, 0.5, np.float16),
                    sum_squared_probs=np.full(length, 0.25 + digest[3] / 512, np.float16),
                    features=Features(np.full(2, digest[1], np.float32), np.zeros(2, np.float32)),
                    version_spans=(VersionSpan(0, length, self.version),),
                    finish_reason="stop",
                    text=str(digest[2] % 2),
                )
            )
        return Group(prompt.group_id, tuple(rollouts))

    async def estimate_baselines(
        self, run_id: str, step: int, groups: Sequence[Group], wait_for_labels_s: float
    ) -> list[GroupBaselines]:
        self.note(f"baselines {step}")
        self.wait_for_labels_s.append(wait_for_labels_s)
        up_to_date = step not in self.behind
        if any(published == step for published, _ in self.labels):
            raise LabelsConsumedError("a baseline now would leak them")
        if not self.probed or step == 0:
            return [GroupBaselines(group.group_id, 0, None, None, up_to_date) for group in groups]
        return [self._answer(group, step, up_to_date) for group in groups]

    def _answer(self, group: Group, step: int, up_to_date: bool) -> GroupBaselines:
        estimator = self.domain_estimators.get(group.domain, self.estimator)
        if estimator == "probe":
            values = np.array([0.25, 0.75], np.float32)
            return GroupBaselines(group.group_id, step, values, values[::-1], up_to_date, "probe")
        values = np.full(len(group.rollouts), 0.125, np.float32)
        if estimator == "score_mean":
            return GroupBaselines(group.group_id, step, values, values, up_to_date, estimator)
        tokens = tuple(each.sum_squared_probs.astype(np.float32) for each in group.rollouts)
        return GroupBaselines(group.group_id, step, values, None, up_to_date, estimator, tokens)

    async def probe_report(self) -> ProbeReport:
        return ProbeReport((), 0, 0, 0, 0, self.estimator, self.domain_estimators)

    async def publish_labels(self, groups: Sequence[Group]) -> int:
        for group in load_labels(dump_labels(groups)):  # without the tokens, which labels do not carry
            known = self.labels.setdefault((group.step, group.group_id), group)
            assert same(known, group), "other labels for the same group"
        self.note(f"publish {groups[0].step}")
        return len(groups)

    async def submit_advantages(self, batch: Batch) -> StepResult:
        batch = load_batch(dump_batch(batch))  # without the features, which batches do not carry
        known = self.batches.get(batch.batch_id)
        assert known is None or same(known, batch), "another batch of the same name"
        if known is None:
            assert not self.crashed
            ages = Counter(
                self.version - span.policy_version for rollout in batch.rollouts for span in rollout.version_spans
            )
            assert 0 <= min(ages) <= max(ages) <= self.max_staleness
            self.batches[batch.batch_id], self.ages[batch.batch_id] = batch, ages
        try:
            self.note(f"submit {batch.step}")
            for _ in range(self.slowness):
                await asyncio.sleep(0.001)
        finally:  # whoever asked may be gone: the learner goes on
            self.version += known is None
        metrics = StepMetrics(
            publish_s=0.0, num_rollouts=4, staleness=self.ages[batch.batch_id], mismatch_kl=self.mismatch_kl
        )
        self.note(f"trained {batch.step}")
        return StepResult(self.version, known is not None, metrics, (), ())

    async def learner_status(self) -> LearnerStatus:
        return LearnerStatus(
            "lineage",
            self.version,
            0,
            "idle",
            0,
            0,
            {},
            "m",
            self.max_staleness,
            (),
            b"",
            "",
            self.has_critic,
            self.aggregation,
        )

    # Verifiers

    async def verify(self, problem: Problem, response: str, finish_reason: str) -> VerifierResult:
        await asyncio.sleep(0)
        self.note("verify")
        return VerifierResult(float(response), None, 0.0)

    # Callbacks

    def on_phase(self, step: int, name: str) -> None:
        self.shown.append((step, name))

    def on_sampled(self, step: int, done: int, total: int) -> None:
        pass

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.note(f"shown {metrics['step']}")

    def on_evaluation_end(self, line: dict[str, Any]) -> None:
        self.note(f"evaluated {line['when']} {line['step']}")


class NotedJournal(StepJournal):
    """A real journal. Each write may be the last before a crash."""

    def __init__(self, path: Path, world: World) -> None:
        super().__init__(path)
        self._world = world

    def write(self, step: JournalledStep) -> None:
        self._world.note(f"journalling {step.step}")
        super().write(step)
        self._world.note(f"journal {step.step}")


class NotedFolder(RunFolder):
    """A real run folder. Each write may be the last before a crash."""

    def __init__(self, path: Path, world: World) -> None:
        super().__init__(path)
        self.journal = NotedJournal(path / "journal", world)
        self._world = world

    def append_lines(self, name: str, lines: Any) -> None:
        super().append_lines(name, lines)
        self._world.note(f"append {name}")

    def write_state(self, state: RunState) -> None:
        super().write_state(state)
        self._world.note(f"state {state.next_step}")


def settings(folder: Path, **values: Any) -> OrchestratorConfig:
    defaults: dict[str, Any] = {
        "run_dir": folder,
        "num_steps": 3,
        "prompts_per_step": 2,
        "tasks": [{"kind": "digits"}],
        "evaluation": {"num_prompts": 2, "rollouts_per_prompt": 2, "every_steps": 2},
    }
    return OrchestratorConfig(**(defaults | values))


async def drive(config: OrchestratorConfig, world: World, stopping: asyncio.Event | None = None) -> bool:
    """Do the work of one process: open the folder and run until the end, a stop or a crash."""
    folder = NotedFolder(config.run_dir, world)
    state = folder.open(config.run_id, {})
    mixture = Mixture(config.tasks, config.seed, config.on_bad_row)
    try:
        loop = TrainingLoop(config, folder, world, world, mixture, world, stopping or asyncio.Event())
        return await loop.run(state)
    finally:
        folder.close()


def same(left: object, right: object) -> bool:
    """Return whether two of the SDK's dataclasses are equal, including their arrays."""
    return repr(left) == repr(right)
