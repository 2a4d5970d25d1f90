"""Start `poise` commands and all services of a run as processes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.local.processes.process import poll_readyz
from poise.local.run_file import SERVICES, LocalRun, load_run

READY_TIMEOUT_S = 500.0
STOP_TIMEOUT_S = 300.0


def write_run_file(folder: Path, values: dict[str, Any]) -> Path:
    """Write a run.yaml; its run folder is `run`, next to it."""
    values = {"run": {"name": "test", "dir": str(folder / "run")}} | values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


COMMAND = (
    # A shell's background job, and each of its children, ignores Ctrl-C from the start.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from poise.cli import main; main()"
)


def poise(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a `poise` command as a user would."""
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], text=True, **options)


@contextlib.contextmanager
def services_up(run_file: Path) -> Iterator[LocalRun]:
    """Run `poise up` with ready services; clients without a token of their own send the run's."""
    with services_started(run_file) as run, run_token(run):
        yield run


@contextlib.contextmanager
def run_token(run: LocalRun) -> Iterator[None]:
    """Let clients without a token of their own send the run's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("POISE_TOKEN_FILE", str(run.train.endpoints.token_file))
        yield


@contextlib.contextmanager
def services_started(run_file: Path) -> Iterator[LocalRun]:
    """Run `poise up`, wait until the services are ready, and stop it afterwards as Ctrl-C does."""
    log = run_file.with_suffix(".up.log")
    with log.open("w") as output:
        process = poise("up", "-c", str(run_file), stdout=output, stderr=output)
    run = load_run(run_file)
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not all(asyncio.run(poll_readyz(run.admin_address(name)))[0] for name in SERVICES):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield run
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
