"""The service as a process: start, exit status and leftovers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tests.integration.generation.conftest import Reference
from tests.integration.generation.polling import DEADLINE_S
from tests.support.forking import ForkedProgram
from tests.support.pushes import push_messages, weight_arrays
from tests.support.scripted_engine import PARAMETERS

from poise_client import GenerationClient, RetryPolicy
from poise_client.errors import UnavailableError
from poise_client.types import Prompt
from poise_proto.v1.generation_pb2_grpc import GenerationServiceStub

CRASHING = ("tests.integration.generation.crashing_service", "--set", "model=scripted")


@dataclass
class Process:
    """One of them."""

    process: ForkedProgram
    log_file: Path
    address_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def addresses(self) -> dict[str, Any]:
        self.wait_for(self.address_file.exists)
        return dict(json.loads(self.address_file.read_text()))

    def rest(self, method: str, path: str) -> httpx.Response:
        url = f"http://{self.addresses()['admin']}{path}"
        return httpx.request(method, url, headers={"x-poise": "1"}, timeout=DEADLINE_S)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.rest("GET", "/readyz").status_code == 200)

    def client(self, **options: Any) -> GenerationClient:
        return GenerationClient(self.addresses()["grpc"], timeout_s=DEADLINE_S, **options)

    def exit_status(self) -> int:
        return self.process.wait(DEADLINE_S)


@contextmanager
def run(folder: Path, program: str, *options: str, port: int = 0) -> Iterator[Process]:
    folder.mkdir()
    log_file, address_file = folder / "log", folder / "addresses.json"
    settings = (f"grpc.port={port}", "admin.port=0", f"staging_dir={folder.parent / 'staging'}", "engine=torch")
    own = [option for setting in settings for option in ("--set", setting)]
    environment = os.environ | {"POISE_ADDRESS_FILE": str(address_file)}
    process = ForkedProgram(program, [*options, *own], environment, log_file)
    try:
        yield Process(process, log_file, address_file)
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def small() -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in PARAMETERS.items()}


def sample(client: GenerationClient, prompt: str) -> list[str]:
    (group,) = client.stream_trajectories("run", 0, [Prompt("g", prompt)], num_rollouts=2)
    return [rollout.text for rollout in group.rollouts]


def test_death_of_the_engine_ends_the_process_with_status_1(tmp_path: Path) -> None:
    with run(tmp_path / "run", *CRASHING) as process:
        process.wait_until_ready()
        with process.client(retries=RetryPolicy(max_attempts=1)) as client:
            assert len(sample(client, "live")) == 2
            with pytest.raises(UnavailableError, match=r"the engine (died|is not running)"):
                sample(client, "die")
        assert process.exit_status() == 1
        assert "generation failed: the engine died" in process.log
        assert "Traceback" not in process.log


def test_readiness_and_status_show_the_version(tmp_path: Path) -> None:
    with run(tmp_path / "run", *CRASHING, "--set", "wait_for_learner=true") as process:
        process.wait_for(lambda: "learner" in process.rest("GET", "/readyz").text)
        assert process.rest("GET", "/readyz").status_code == 503
        with process.client() as client:
            client.update_weights(lineage_id="a", policy_version=6, weights=weight_arrays(small()))
            assert process.rest("GET", "/readyz").status_code == 200
            status = process.rest("GET", "/admin/v1/status").json()
            policy = client.get_policy()
            assert (status["lineage_id"], status["policy_version"]) == ("a", 6)
            assert (policy.lineage_id, policy.policy_version, policy.ready) == ("a", 6, True)
            assert status["digest"] == policy.digest.hex()
            process.rest("POST", "/admin/v1/pause").raise_for_status()
            assert not client.get_policy().ready
            process.rest("POST", "/admin/v1/resume").raise_for_status()
            assert client.get_policy().ready
        assert "poise_generation_policy_version 6.0" in process.rest("GET", "/metrics").text


def test_leftovers_of_a_killed_push_are_removed(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    with run(tmp_path / "first", *CRASHING) as process:
        process.wait_until_ready()

        async def push_and_kill() -> None:
            begin, *_ = push_messages(small(), 1)

            async def halting() -> Any:
                yield begin
                await asyncio.Event().wait()

            async with grpc.aio.insecure_channel(process.addresses()["grpc"]) as channel:
                call = GenerationServiceStub(channel).UpdateWeights(halting())
                await asyncio.to_thread(process.wait_for, lambda: staging.exists() and any(staging.iterdir()))
                process.process.kill()
                with pytest.raises(grpc.aio.AioRpcError):
                    await call

        asyncio.run(push_and_kill())
        process.exit_status()
        assert any(staging.iterdir())
    with run(tmp_path / "second", *CRASHING) as process:
        process.wait_until_ready()
        assert not any(staging.iterdir())


@pytest.mark.slow
def test_torch_engine_serves_until_sigterm(tmp_path: Path, reference: Reference) -> None:
    command = ("poise.generation", "--set", f"model={reference.folder}")
    with run(tmp_path / "run", *command) as process:
        process.wait_until_ready()
        with process.client() as client:
            assert len(sample(client, "hi")) == 2
        process.process.send_signal(signal.SIGTERM)
        assert process.exit_status() == 0
        assert "Traceback" not in process.log


@pytest.mark.slow
def test_missing_model_ends_the_process_with_status_2(tmp_path: Path) -> None:
    with run(tmp_path / "run", "poise.generation", "--set", "model=/nowhere/at/all") as process:
        assert process.exit_status() == 2
        assert "generation cannot start: model /nowhere/at/all cannot be loaded" in process.log
        assert "Traceback" not in process.log
