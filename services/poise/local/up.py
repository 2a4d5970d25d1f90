"""`poise up` and `poise run`: the services of a run on this machine, alone or with its training."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from poise.local.process import ProcessSpec
from poise.local.run_file import SERVICES, LocalRun
from poise.local.supervisor import Supervisor, SupervisorError
from poise.local.valkey import valkey_command

logger = logging.getLogger(__name__)

_INTERRUPTED = 130


def run_services(run: LocalRun, *, train: bool) -> int:
    """Start the services; then stay until a signal, or train and stop them. Returns the exit status."""
    _write_settings(run)
    # Threads that spin while they wait take the cores from the other processes: steps took three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return asyncio.run(_supervise(run, train))
    except SupervisorError as error:
        logger.error("%s", error)
        return 1


async def _supervise(run: LocalRun, train: bool) -> int:
    stopping = asyncio.Event()
    async with Supervisor(run.services_dir) as supervisor:
        with _signals(supervisor, stopping):
            await supervisor.start([_valkey(run), *(_service(run, name) for name in SERVICES)])
            ready = asyncio.create_task(supervisor.wait_ready(SERVICES))
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
                return _INTERRUPTED if train else 0
            ready.result()
            if train:
                status = await supervisor.run_to_end(_training(run))
                return _INTERRUPTED if status is None or status < 0 else status
            for name in SERVICES:
                logger.info("%s: admin on http://%s, log in %s", name, run.admin_address(name), run.log(name))
            logger.info("up; train with `poise train`, stop with Ctrl-C")
            await supervisor.first_of(stopped)
            return 0


@contextmanager
def _signals(supervisor: Supervisor, stopping: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            supervisor.kill_all()
            os._exit(_INTERRUPTED)
        stopping.set()
        logger.info("stopping; again to kill everything at once")
        supervisor.end("train")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _settings_file(run: LocalRun, program: str) -> Path:
    return run.services_dir / f"{program}.yaml"


def _write_settings(run: LocalRun) -> None:
    """Write each program's settings where it will read them."""
    run.services_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for program, tree in run.trees.items():
        path = _settings_file(run, program)
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))


def _valkey(run: LocalRun) -> ProcessSpec:
    return ProcessSpec("valkey", valkey_command(run.socket, run.services_dir / "valkey"), run.log("valkey"))


def _service(run: LocalRun, name: str) -> ProcessSpec:
    command = [sys.executable, "-m", f"poise.{name}", "-c", str(_settings_file(run, name))]
    return ProcessSpec(name, command, run.log(name), run.admin_address(name))


def _training(run: LocalRun) -> ProcessSpec:
    command = [sys.executable, "-m", "poise.orchestrator", "-c", str(_settings_file(run, "train"))]
    return ProcessSpec("train", command, None, stop_signal=signal.SIGINT)
