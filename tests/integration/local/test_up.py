"""Starting the services of a run, with obstacles and without."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.integration.local.test_cli import poise
from tests.support.local_services import poise as poise_process

from poise.local.processes.supervisor import Supervisor
from poise.local.run_file import load_run
from poise.local.up import run_services
from poise.runtime.config.settings import ConfigError

DEADLINE_S = 300.0


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    values = {"run": {"dir": str(tmp_path / "run")}, "model": "org/model", "train": {"tasks": [{"kind": "digits"}]}}
    path.write_text(yaml.safe_dump(values))
    return path


async def test_running_services_are_not_started_again(run_file: Path) -> None:
    run = load_run(run_file)
    async with Supervisor(run.services_dir):
        done = await asyncio.to_thread(poise, "up", "-c", str(run_file), "--set", "value.probe.alpha=7")
    assert done.returncode == 1
    assert f"the services of {run.dir} are already running. Use `poise train`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.services_dir / "value.yaml").exists()


def test_run_of_another_model_is_rejected_before_the_start(run_file: Path) -> None:
    run = load_run(run_file)
    (run.services_dir / "learner").mkdir(parents=True)
    (run.services_dir / "model").write_text("org/other")
    for command in ("up", "run"):
        done = poise(command, "-c", str(run_file))
        assert done.returncode == 2
        assert (
            f"{run.dir} contains a run of model org/other, not org/model. Give the new run another name" in done.stderr
        )
    assert (run.services_dir / "model").read_text() == "org/other"
    assert not (run.dir / "logs").exists()


def test_missing_task_file_is_reported_before_the_start(run_file: Path) -> None:
    done = poise("run", "-c", str(run_file), "--set", "train.tasks=[{kind: jsonl, path: absent.jsonl}]")
    assert done.returncode == 2
    assert "absent.jsonl: is not readable" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_file.parent / "run" / "logs").exists()


def test_train_waits_for_services_until_a_signal(run_file: Path) -> None:
    log = run_file.with_suffix(".log")
    with log.open("w") as output:
        process = poise_process("train", "-c", str(run_file), stdout=output, stderr=output)
    try:
        wait_for(log, "waiting for learner at", process)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert "`poise up` starts the services, `poise status` shows them" in said
    assert "Traceback" not in said


def test_taken_port_is_replaced_for_all_programs(run_file: Path) -> None:
    log, taken = run_file.with_suffix(".log"), load_run(run_file).generation.grpc.port
    with socket.create_server(("127.0.0.1", taken)), log.open("w") as output:
        process = poise_process("up", "-c", str(run_file), "--set", "engine=torch", stdout=output, stderr=output)
        try:
            wait_for(log, f"port {taken} of generation.grpc is taken by another program; using ", process)
            train, learner = (run_file.parent / "run" / "services" / f"{name}.yaml" for name in ("train", "learner"))
            wait_until(lambda: train.exists() and train.stat().st_size > 0, log, process)
            run = load_run(run_file)
            assert run.generation.grpc.port != taken
            settings = yaml.safe_load(train.read_text()), yaml.safe_load(learner.read_text())
            assert settings[0]["endpoints"]["generation"] == settings[1]["replicas"] == [run.grpc_address("generation")]
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def test_signal_during_the_start_stops_the_services(run_file: Path) -> None:
    log = run_file.with_suffix(".log")
    with log.open("w") as output:
        process = poise_process("up", "-c", str(run_file), "--set", "engine=torch", stdout=output, stderr=output)
    pids_file = run_file.parent / "run" / "services" / "pids.json"
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (pids_file.exists() and len(json.loads(pids_file.read_text())) == 4):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        pids = [pid for pid, _ in json.loads(pids_file.read_text()).values()]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not pids_file.exists()
    assert "Traceback" not in log.read_text()


def wait_for(log: Path, text: str, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: text in log.read_text(), log, process)


def wait_until(condition: Callable[[], bool], log: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_other_systems_than_linux_are_rejected(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    run = load_run(run_file)
    with pytest.raises(ConfigError, match="requires Linux"):
        run_services(run, lambda: run, train=False)
