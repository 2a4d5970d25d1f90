"""Starts, kills and calls value services as processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from click.testing import CliRunner
from tests.support.forking import ForkedProgram
from tests.support.groups import make_group, moved
from tests.support.ports import free_port

from poise.cli import main
from poise_client import AsyncValueClient
from poise_client.types import EntropyStats, Features, Group, Rollout

SCRIPT = Path(__file__).with_name("recording_service.py")
TIMEOUT_S = 240.0
WIDTH = 8
NUM_TOKENS = 5

PROBE = ("probe.warmup_steps=2", "probe.min_rows=4", "probe.alpha=1")


async def eventually(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait until `condition`, a function or coroutine function, returns a true value; return it."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"it never came to pass: {what or condition}"
        await asyncio.sleep(0.01)


class ValueService:
    """One service across restarts: same state, ports and log."""

    def __init__(self, folder: Path, url: str, *settings: str) -> None:
        self.folder = folder
        self.record_file = folder / "fits.jsonl"
        self.log_file = folder / "value.log"
        self.grpc, self.admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
        (folder / "value.yaml").write_text(json.dumps({"queue": {"url": url}}))
        options = [
            f"state_dir={folder / 'state'}",
            f"grpc.port={self.grpc.split(':')[1]}",
            f"admin.port={self.admin.split(':')[1]}",
            *PROBE,
            *settings,
        ]
        self._arguments = [str(self.record_file), "-c", str(folder / "value.yaml")]
        self._arguments += [part for option in options for part in ("--set", option)]
        self.process: ForkedProgram | None = None

    def start(self) -> None:
        environment = os.environ | {"GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1"}
        self.process = ForkedProgram(str(SCRIPT), self._arguments, environment, self.log_file)

    def kill(self) -> None:
        """Kill the process, like `kill -9`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(TIMEOUT_S)

    async def interrupt(self, phase: str, delay_s: float, dies: bool, wait_s: float) -> list[str]:
        """Wait until `delay_s` after the next start of `phase`; kill the service if `dies`. Return the phases then."""
        order, phases = (self.record_file.with_suffix(f".{name}") for name in ("order", "phases"))
        phases.unlink(missing_ok=True)
        partial = order.with_suffix(".part")
        partial.write_text(json.dumps({"phase": phase, "delay_s": delay_s, "dies": dies}))
        partial.replace(order)
        deadline = time.monotonic() + wait_s
        while not phases.exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        order.unlink(missing_ok=True)
        return (json.loads(phases.read_text()) or ["idle"]) if phases.exists() else ["idle"]

    @contextlib.contextmanager
    def blocked_fits(self) -> Iterator[None]:
        """Block the end of every fit inside the block."""
        hold = self.record_file.with_suffix(".hold")
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def client(self) -> AsyncValueClient:
        return AsyncValueClient(self.grpc)

    async def get(self, path: str) -> httpx.Response | None:
        """Return the response; None while nothing listens."""
        return await self._ask("GET", path)

    async def post(self, action: str) -> httpx.Response:
        answer = await self._ask("POST", f"/admin/v1/{action}")
        assert answer is not None
        return answer

    async def _ask(self, method: str, path: str) -> httpx.Response | None:
        try:
            async with httpx.AsyncClient(
                base_url=f"http://{self.admin}", headers={"x-poise": "1"}, timeout=TIMEOUT_S
            ) as rest:
                return await rest.request(method, path)
        except httpx.TransportError:
            return None

    async def status(self) -> dict[str, Any]:
        answer = await self.get("/admin/v1/status")
        return {} if answer is None else answer.json()

    async def ready(self) -> None:
        async def is_ready() -> bool:
            assert self.process is not None and self.process.poll() is None, self.log
            answer = await self.get("/readyz")
            return answer is not None and answer.status_code == 200

        await eventually(is_ready, "ready")

    async def not_ready_reason(self, part: str) -> str:
        """Wait until the service is not ready for a reason that contains `part`; return the reason."""

        async def reason() -> str:
            answer = await self.get("/readyz")
            return answer.text if answer is not None and answer.status_code == 503 and part in answer.text else ""

        return await eventually(reason, part)

    def seen_by_version(self) -> dict[tuple[str, int], set[tuple[str, int]]]:
        """Return the (run, step) pairs that each probe was fitted on, by domain and version."""
        lines = [json.loads(line) for line in self.record_file.read_text().splitlines()]
        return {(line["domain"], line["version"]): {(run, step) for run, step in line["seen"]} for line in lines}


def poise(*arguments: str) -> str:
    """Run a `poise` command in this process, which is faster; return its output."""
    done = CliRunner().invoke(main, arguments, prog_name="poise")
    assert done.exit_code == 0, done.output
    return done.stdout


class Maker:
    """Makes random features from one seed."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self._token_random = np.random.default_rng(1)

    def rollouts(self, n: int = 2, width: int = WIDTH) -> tuple[Features, ...]:
        def one() -> Features:
            hidden = self.random.normal(size=(2, width)).astype(np.float32)
            return Features(*hidden, *(EntropyStats(*self.random.random(4).tolist()) for _ in range(3)))

        return tuple(one() for _ in range(n))

    def query(self, group_id: str = "g0", domain: str = "default", **options: Any) -> Group:
        """Return a group whose rewards depend on its features."""
        rollouts = self.rollouts(**options)
        rewards = 1 / (1 + np.exp([-rollout.prompt_hidden[0] for rollout in rollouts]))
        return self._with_tokens(make_group(group_id, rollouts, rewards, domain=domain))

    def _with_tokens(self, group: Group) -> Group:
        """Return the group with token statistics, which score-weighted estimators need."""

        def one(rollout: Rollout) -> Rollout:
            probabilities = self._token_random.uniform(0.3, 1.0, NUM_TOKENS)
            return dataclasses.replace(
                rollout,
                logprobs=np.log(probabilities).astype(np.float32),
                token_entropies=(2 - 2 * probabilities).astype(np.float16),
                sum_squared_probs=(probabilities**2 + (1 - probabilities) ** 2).astype(np.float16),
            )

        return dataclasses.replace(group, rollouts=tuple(map(one, group.rollouts)))

    def label(self, run_id: str, step: int, query: Group | None = None, **options: Any) -> Group:
        return moved(query or self.query(**options), run_id, step)


def numbers(answers: Sequence[Any]) -> list[tuple[int, bytes, bytes]]:
    """Return the parts of an answer that must be the same for a repeated request."""
    return [
        (
            each.probe_version,
            b"" if each.values is None else each.values.tobytes(),
            b"" if each.baselines is None else each.baselines.tobytes(),
        )
        for each in answers
    ]


async def consumed(client: AsyncValueClient) -> None:
    """Wait until the queue is empty."""

    async def nothing_pending() -> bool:
        return (await client.get_probe()).num_pending == 0

    await eventually(nothing_pending, "all labels are consumed")


async def fitted(client: AsyncValueClient, domain: str, version: int) -> None:
    """Wait until a domain's probe has at least this version."""

    async def is_fitted() -> bool:
        report = await client.get_probe()
        return any(each.domain == domain and each.probe_version >= version for each in report.probes)

    await eventually(is_fitted, f"version {version} of domain {domain}")


async def warm_up(client: AsyncValueClient, make: Maker, domain: str = "default") -> None:
    """Publish enough labels, in a separate run, for a domain's first probe."""
    await client.publish_labels(
        [make.label(f"past.{domain}", step, group_id=f"g{i}", domain=domain) for step in range(2) for i in range(4)]
    )
    await consumed(client)
    await fitted(client, domain, 1)
