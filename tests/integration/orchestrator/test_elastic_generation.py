"""Generation replicas killed, added and drained while a run is driven: nothing lost or doubled, the work shared."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.models import make_tiny_llama

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.evaluating import Evaluator
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.run_folder import RunFolder
from poise.orchestrator.sampling import StepSampler
from poise.orchestrator.scoring import Scorer
from poise.orchestrator.services import Services
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import Problem
from poise.orchestrator.verifiers.pool import Verdict
from poise_client import LearnerClient

DEADLINE_S = 120.0
PROMPTS, ROLLOUTS = 24, 2


def free_address() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listening.getsockname()[1]}"


class Fleet:
    """Service processes by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, service: str, address: str, **settings: Any) -> None:
        settings |= {"grpc.port": address.rpartition(":")[2], "admin.port": 0}
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"poise.{service}", *options],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


class Run:
    """One run, driven in this process: its watcher, its verifier, and what is done to its replicas."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        self.num_done = 0
        self.stopping = asyncio.Event()
        self.services = Services(config.endpoints, self.stopping)

    async def drive(self, num_steps: int) -> bool:
        config = self.config.model_copy(update={"num_steps": num_steps})
        folder, mixture = RunFolder(config.run_dir), Mixture(config.tasks, config.seed)
        state = folder.open(config.run_id, {})
        scorer = Scorer(self.services, self)  # type: ignore[arg-type]
        sampler = StepSampler(config, folder, self.services, mixture, scorer, self)
        evaluator = Evaluator(config, folder, mixture, scorer, self)
        with contextlib.closing(folder):
            return await TrainingLoop(config, folder, self.services, sampler, evaluator, self, self.stopping).run(state)

    async def verify(self, problem: Problem, response: str) -> Verdict:
        return Verdict(float(len(response) % 2), None, 0.0)

    def phase(self, step: int, name: str) -> None:
        pass

    def sampled(self, step: int, done: int, total: int) -> None:
        pass

    def step_done(self, numbers: dict[str, Any]) -> None:
        self.num_done += 1

    def evaluated(self, line: dict[str, Any]) -> None:
        pass

    def has_work(self, address: str) -> bool:
        return self.services._replicas._replicas[address].num_rollouts > 0

    async def steps(self, count: int) -> dict[str, int]:
        """Return the tokens that each replica handed over during that many steps from now."""
        before = self.services.served_tokens
        target = self.num_done + count
        await eventually(lambda: self.num_done >= target)
        return {address: num - before.get(address, 0) for address, num in self.services.served_tokens.items()}


async def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def assert_balanced(served: dict[str, int], among: list[str]) -> None:
    """The replicas `among` handed over about as much as each other, and no other did anything."""
    total = sum(served.values())
    shares = {address: round(num / total, 3) for address, num in served.items()}
    assert all(0.6 / len(among) < shares[address] < 1.5 / len(among) for address in among), shares
    assert all(not share for address, share in shares.items() if address not in among), shares


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


@pytest.mark.timeout(300)
async def test_replicas_come_and_go_and_no_rollout_is_lost_or_doubled(fleet: Fleet, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    learner = free_address()
    killed, drained, steady, added = replicas = [free_address() for _ in range(4)]

    def start_replica(name: str, address: str) -> None:
        fleet.start(
            name,
            "generation",
            address,
            model=model,
            engine="torch",
            dtype="float32",
            staging_dir=tmp_path / name,
            wait_for_learner="true",
        )

    fleet.start(
        "learner",
        "learner",
        learner,
        model=model,
        state_dir=tmp_path / "learner",
        replicas=json.dumps(replicas),
        threads=1,
        max_staleness=1,
    )
    for name, address in (("killed", killed), ("drained", drained), ("steady", steady)):
        start_replica(name, address)
    config = OrchestratorConfig(
        run_dir=tmp_path / "run",
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
    run = Run(config)

    async def mistreat() -> None:
        assert_balanced(await run.steps(2), [killed, drained, steady])
        start_replica("added", added)
        await eventually(lambda: run.has_work(killed))
        fleet.processes["killed"].kill()
        await eventually(lambda: run.services.served_tokens[added] > 0)
        await run.steps(1)
        assert_balanced(await run.steps(2), [drained, steady, added])
        await eventually(lambda: run.has_work(drained))
        fleet.processes["drained"].send_signal(signal.SIGTERM)
        await eventually(lambda: fleet.processes["drained"].poll() is not None)
        await run.steps(2)
        assert_balanced(await run.steps(2), [steady, added])

    async with run.services:
        async with asyncio.timeout(DEADLINE_S):
            await run.services.wait_until_up(with_value=False)
            while sum(replica.is_ready for replica in run.services._replicas._replicas.values()) < 3:
                await run.services._replicas.look()
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
        num_steps = run.num_done + 2
        assert await run.drive(num_steps)
        assert fleet.processes["drained"].returncode == 0, fleet.log("drained")

    # Each rollout of each step once: in what was written down, and in what the learner trained on.
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(num_steps))
    assert all(row["learner"]["num_rollouts"] == PROMPTS * ROLLOUTS for row in rows)
    assert max(row["staleness"]["max"] for row in rows) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()]
    groups = [(line["step"], line["group_id"]) for line in lines]
    assert sorted(groups) == [
        (step, f"{group:05d}") for step in range(num_steps) for group in range(PROMPTS) for _ in range(ROLLOUTS)
    ]
    with LearnerClient(learner) as client:
        status = client.get_status()
    assert status.num_rollouts == num_steps * PROMPTS * ROLLOUTS
    assert status.num_rejected == {}
    assert status.policy_version == num_steps
