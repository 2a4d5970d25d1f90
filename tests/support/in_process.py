"""The services' real insides without their wires: engine, estimator and trainer, called by the real loop.

What is left out has tests of its own: gRPC, the queue, files, and processes that come and go. In return a run is
deterministic, and takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from poise.generation.config import GenerationConfig
from poise.generation.engines.transformers.engine import TorchEngine
from poise.generation.sampler import Sampler
from poise.learner.training.trainer import Trainer
from poise.local.run_file import LocalRun
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.rewards.pool import VerifierResult
from poise.orchestrator.rewards.verifiers import reward_function
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.runtime.rpc.validation import Violations
from poise.value.app import make_fitter
from poise.value.config import ValueConfig
from poise.value.estimators.interface import Fitter
from poise.value.estimators.step_probes import VersionedProbe
from poise.value.messages import parse_label, read_queries
from poise.value.state import ValueState
from poise_client.codec import encode
from poise_client.types import (
    Batch,
    Group,
    GroupBaselines,
    Prompt,
    Sampling,
    StepMetrics,
)
from poise_proto.v1 import value_pb2


class InProcess:
    """Generation, value and learner of one run; verifiers and run folder besides. Use as an async context manager."""

    def __init__(self, run: LocalRun, folder: Path) -> None:
        self._weights = folder / "weights.safetensors"
        generation: GenerationConfig = run.generation
        self._engine = TorchEngine(generation)
        self._sampler = Sampler(self._engine, generation)
        self._trainer = Trainer(run.learner)
        self._value: ValueConfig = run.value
        self.state = ValueState(run.value)
        self._fitters: dict[str, Fitter] = {}
        self.version = 0

    async def __aenter__(self) -> InProcess:
        self._trainer.load()
        await self._engine.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._engine.stop()
        self._trainer.close()

    # What the loop asks of services.

    async def sample(
        self,
        run_id: str,
        step: int,
        prompts: Sequence[Prompt],
        num_rollouts: int,
        sampling: Sampling,
        min_policy_version: int,
    ) -> AsyncGenerator[Group, None]:
        assert min_policy_version == self.version
        async with contextlib.aclosing(self._sampler.sample(run_id, step, prompts, num_rollouts, sampling)) as groups:
            async for group in groups:
                yield group

    async def estimate_baselines(
        self, run_id: str, step: int, groups: Sequence[Group], wait_for_labels_s: float
    ) -> list[GroupBaselines]:
        wrong = Violations()
        messages = [encode(group, value_pb2.GroupFeatures) for group in groups]
        asked = [query for query in read_queries(messages, wrong, self._value.estimator_of) if query is not None]
        wrong.raise_if_any()
        return self.state.estimate(run_id, step, asked, behind=frozenset())  # `learn` refits at once

    def learn(self, labels: Sequence[Group]) -> None:
        """Learn labels as the value service does, and refit at once."""
        for label in labels:
            payload = encode(label, value_pb2.LabelledGroup).SerializeToString()
            self.state.learn(parse_label(payload, len(payload), self._value.estimator_of))
        for name, domain in self.state.domains.items():
            if self.state.is_due(name):
                fitter = self._fitters.setdefault(name, make_fitter(self._value, name))
                fitted = fitter.fit(domain.window.groups)
                version = self.state.next_version(name)
                self.state.install(name, VersionedProbe(version, fitted, domain.window.num_added, 0.0))

    async def train(self, batch: Batch) -> StepMetrics:
        """Train on a batch and serve what comes of it."""
        metrics = await asyncio.to_thread(self._trainer.train, batch.rollouts, batch.temperature)
        self.version += 1
        save_file({name: weight.array for name, weight in self._trainer.weights().items()}, self._weights)
        await self._engine.update_weights(self._weights, self.version)
        return metrics

    # Verifiers and callbacks.

    async def verify(self, problem: Problem, response: str, finish_reason: str) -> VerifierResult:
        return VerifierResult(reward_function(problem)(response, finish_reason), None, 0.0)

    def on_phase(self, step: int, name: str) -> None: ...

    def on_sampled(self, step: int, done: int, total: int) -> None: ...


async def learning_curve(run: LocalRun, folder: Path) -> list[float]:
    """Train for a run's steps; return the mean reward of what each sampled."""
    config: OrchestratorConfig = run.train
    rewards = []
    run_folder = RunFolder(folder / "run")
    run_folder.open(config.run_id, {})
    async with InProcess(run, folder) as world:
        services: Any = world
        mixture = Mixture(config.tasks, config.seed)
        loop = TrainingLoop(config, run_folder, services, services, mixture, services, asyncio.Event())
        with contextlib.closing(run_folder):
            for step in range(config.num_steps):
                journalled = await loop.sample_step(step, world.version)
                world.learn(journalled.labels)
                await world.train(journalled.batch)
                rewards.append(float(journalled.metrics["reward"]["mean"]))
    return rewards
