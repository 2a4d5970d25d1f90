"""Drives a run while its generation replicas are killed, added and drained, and counts the rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.forking import ForkedProgram
from tests.support.ports import free_port
from tests.support.tiny_models import make_tiny_llama

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.rewards.pool import VerifierResult
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.storage.run_folder import RunFolder
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise_client import LearnerClient

DEADLINE_S = 500.0
PROMPTS, ROLLOUTS = 24, 2


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


class Fleet:
    """Service processes by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: dict[str, ForkedProgram] = {}

    def start(self, name: str, service: str, address: str, **settings: Any) -> None:
        settings |= {"grpc.port": address.rpartition(":")[2], "admin.port": 0}
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        log = self._folder / f"{name}.log"
        self.processes[name] = ForkedProgram(f"poise.{service}", options, environment, log)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


class Run:
    """One run, driven in this process: its callbacks, its verifier, and the changes to its replicas."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        self.num_done = 0
        self.stopping = asyncio.Event()
        self.services = ServiceClients(config.endpoints, self.stopping)

    async def drive(self, num_steps: int) -> bool:
        config = self.config.model_copy(update={"num_steps": num_steps})
        folder, mixture = RunFolder(config.run_dir), Mixture(config.tasks, config.seed)
        state = folder.open(config.run_id, {})
        verifiers: Any = self
        loop = TrainingLoop(config, folder, self.services, verifiers, mixture, self, self.stopping)
        with contextlib.closing(folder):
            return await loop.run(state)

    async def verify(self, problem: Problem, response: str, finish_reason: str) -> VerifierResult:
        return VerifierResult(float(len(response) % 2), None, 0.0)

    def on_phase(self, step: int, name: str) -> None:
        pass

    def on_sampled(self, step: int, done: int, total: int) -> None:
        pass

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.num_done += 1

    def on_evaluation_end(self, line: dict[str, Any]) -> None:
        pass

    def has_work(self, address: str) -> bool:
        return self.services.replicas.num_assigned(address) > 0

    async def steps(self, count: int) -> dict[str, int]:
        """Return the tokens that each replica handed over during that many steps from now."""
        before = self.services.replicas.served_tokens
        target = self.num_done + count
        await eventually(lambda: self.num_done >= target)
        return {address: num - before.get(address, 0) for address, num in self.services.replicas.served_tokens.items()}


async def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


@dataclass
class Outcome:
    """The result of a run, from its files and from the learner."""

    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Each replica's share of the response tokens of two steps, by phase."""
    num_steps: int = 0
    num_expected: int = 0
    """Rollouts of those steps."""
    num_written: int = 0
    """Recorded rollouts."""
    num_lost: int = 0
    """Rollouts that were not recorded."""
    num_doubled: int = 0
    """Rollouts that were recorded more than once."""
    num_trained: int = 0
    """Rollouts that the learner trained on."""
    num_rejected: int = 0
    policy_version: int = 0
    max_staleness: int = 0
    drained_status: int | None = None
    """Exit status of the drained replica."""
    drained_log: str = ""


async def drive_elastic_run(folder: Path) -> Outcome:
    """Train with three replicas while one is killed, one added and one drained, to the end of the run."""
    fleet = Fleet(folder)
    try:
        return await _drive(fleet, folder)
    finally:
        fleet.close()


async def _drive(fleet: Fleet, folder: Path) -> Outcome:
    model = make_tiny_llama(folder / "model")
    learner = free_address()
    names = {free_address(): name for name in ("killed", "drained", "steady", "added")}
    replicas = list(names)
    at = {name: address for address, name in names.items()}
    outcome = Outcome()

    def start_replica(name: str) -> None:
        settings = {"model": model, "engine": "torch", "dtype": "float32", "staging_dir": folder / name}
        fleet.start(name, "generation", at[name], **settings, wait_for_learner="true")

    async def note_shares(run: Run, phase: str) -> None:
        served = await run.steps(2)
        total = sum(served.values())
        outcome.shares[phase] = {names[address]: round(num / total, 3) for address, num in served.items()}

    fleet.start(
        "learner",
        "learner",
        learner,
        model=model,
        state_dir=folder / "learner",
        replicas=json.dumps(replicas),
        threads=1,
        max_staleness=1,
    )
    for name in ("killed", "drained", "steady"):
        start_replica(name)
    run = Run(
        OrchestratorConfig(
            run_dir=folder / "run",
            algorithm="rloo",
            prompts_per_step=PROMPTS,
            rollouts_per_prompt=ROLLOUTS,
            samples_per_step=PROMPTS,
            max_staleness=1,
            tasks=[{"kind": "digits"}],
            sampling={"max_tokens": 12},
            evaluation={"num_prompts": 0},
            endpoints={"generation": replicas, "learner": learner},
        )
    )

    async def mistreat() -> None:
        await note_shares(run, "three replicas")
        start_replica("added")
        await eventually(lambda: run.has_work(at["killed"]))
        fleet.processes["killed"].kill()
        await eventually(lambda: run.services.replicas.served_tokens[at["added"]] > 0)
        await run.steps(1)
        await note_shares(run, "one killed, one added")
        await eventually(lambda: run.has_work(at["drained"]))
        fleet.processes["drained"].send_signal(signal.SIGTERM)
        await eventually(lambda: fleet.processes["drained"].poll() is not None)
        await run.steps(2)
        await note_shares(run, "one drained")

    async with run.services:
        async with asyncio.timeout(DEADLINE_S):
            await run.services.wait_until_up(with_value=False)
            while run.services.replicas.num_ready < 3:
                await run.services.replicas.refresh()
                await asyncio.sleep(0.01)
        training = asyncio.create_task(run.drive(1000))
        mistreating = asyncio.create_task(mistreat())
        await asyncio.wait([training, mistreating], return_when=asyncio.FIRST_COMPLETED)
        if training.done():
            mistreating.cancel()
            await training
        run.stopping.set()
        assert not await training
        await mistreating
        run.stopping.clear()
        outcome.num_steps = run.num_done + 2
        assert await run.drive(outcome.num_steps)
    outcome.drained_status = fleet.processes["drained"].returncode
    outcome.drained_log = fleet.log("drained")
    with LearnerClient(learner) as client:
        status = client.get_status()
    outcome.num_trained, outcome.policy_version = status.num_rollouts, status.policy_version
    outcome.num_rejected = sum(status.num_rejected.values())
    _count(outcome, folder / "run")
    return outcome


def _count(outcome: Outcome, run: Path) -> None:
    """Compare the recorded rollouts with those of each step."""
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    written = Counter((line["step"], line["group_id"]) for line in lines)
    expected = Counter(
        {(step, f"{group:05d}"): ROLLOUTS for step in range(outcome.num_steps) for group in range(PROMPTS)}
    )
    outcome.num_expected, outcome.num_written = expected.total(), written.total()
    outcome.num_lost, outcome.num_doubled = (expected - written).total(), (written - expected).total()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(outcome.num_steps))
    assert all(row["learner"]["num_rollouts"] == PROMPTS * ROLLOUTS for row in rows)
    outcome.max_staleness = max(row["staleness"]["max"] for row in rows)
