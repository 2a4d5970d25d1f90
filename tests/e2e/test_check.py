"""`poise check` against real services: what works is said, what does not fails by name, and nothing is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.forwarder import forwarding
from tests.support.local_services import COMMAND

from poise.local.run_file import LocalRun
from poise.orchestrator.check import CheckConfig, CheckFailed, compare, run_check
from poise.orchestrator.config import EndpointsConfig
from poise_client import GenerationClient, LearnerClient, ValueClient


def test_services_that_work_pass_and_are_left_as_they_were(tiny_run: LocalRun) -> None:
    endpoints = tiny_run.train.endpoints
    with ValueClient(endpoints.value) as value, LearnerClient(endpoints.learner) as learner:
        before = value.get_probe(), learner.get_status()
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "check", "-c", str(tiny_run.dir.parent / "run.yaml")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["learner", "generation", "value", "all"]
        assert (value.get_probe(), learner.get_status()) == before


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_replicas_at_ipv6_addresses_pass(tiny_run: LocalRun, capsys: pytest.CaptureFixture[str]) -> None:
    endpoints = tiny_run.train.endpoints

    async def check() -> int:
        async with forwarding(endpoints.generation[0], host="::1") as replica:
            there = endpoints.model_copy(update={"generation": (replica.address,)})
            return await asyncio.to_thread(run_check, CheckConfig(endpoints=there))

    assert asyncio.run(check()) == 0, capsys.readouterr().out


def test_a_service_that_does_not_answer_fails_in_time(tiny_run: LocalRun, capsys: pytest.CaptureFixture[str]) -> None:
    endpoints = tiny_run.train.endpoints
    nobody = EndpointsConfig(generation=endpoints.generation, learner=endpoints.learner, value="127.0.0.1:1")
    assert run_check(CheckConfig(endpoints=nobody, timeout_s=3.0)) == 1
    printed = capsys.readouterr().out
    assert "failed" in printed and "all checks passed" not in printed


def test_a_token_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(CheckConfig(endpoints=EndpointsConfig(token_file=tmp_path / "gone"))) == 2
    assert "endpoints.token_file" in capsys.readouterr().out


def test_replicas_that_serve_something_else_than_the_learner_holds_are_named(tiny_run: LocalRun) -> None:
    endpoints = tiny_run.train.endpoints
    with GenerationClient(endpoints.generation[0]) as generation, LearnerClient(endpoints.learner) as learner:
        policy, status = generation.get_policy(), learner.get_status()
    compare("host:1", policy, status)
    with pytest.raises(CheckFailed, match=r"host:1 .* did not push"):
        compare("host:1", dataclasses.replace(policy, lineage_id="another"), status)
    with pytest.raises(CheckFailed, match=r"host:1 .* weights that differ"):
        compare("host:1", dataclasses.replace(policy, digest=b"\0" * 32), status)
    compare("host:1", dataclasses.replace(policy, digest=b"\0" * 32, policy_version=7), status)
