"""`poise up` and `poise run`: the services of a run on this machine, alone or with its training."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

from poise.local.addresses import SERVICES, renew_taken_ports
from poise.local.models.catalog import KNOWN_MODELS, locate_model, make_model
from poise.local.processes.process import ProcessSpec
from poise.local.processes.supervisor import Supervisor, SupervisorError
from poise.local.processes.valkey import valkey_command
from poise.local.run_file import LocalRun
from poise.local.status import push_problems
from poise.runtime.cli.broken_pipe import is_unread
from poise.runtime.cli.exit_status import INTERRUPTED, OK, OUTPUT_CLOSED
from poise.runtime.cli.signals import stop_on_signal
from poise.runtime.config.settings import ConfigError, ServiceConfig, check_readable
from poise.runtime.files.atomic import restrict_umask, write_file
from poise.runtime.network.unix_sockets import check_socket_path

logger = logging.getLogger(__name__)

_LOOK_AT_OUTPUT_EVERY_S = 1.0


def run_services(
    run: LocalRun, reload: Callable[[], LocalRun], *, train: bool, training_log: Path | None = None
) -> int:
    """Start the services; then stay until a signal, or train and stop them. Returns the exit status.

    `reload` returns the run as it is once its ports have changed. What the training says goes to `training_log`, else
    to the terminal.

    Raises:
        ConfigError: the model cannot be made, the folder holds a run of another, a socket's path is too long, a file of
            a token or certificate cannot be read, or this is no Linux.
    """
    if platform.system() != "Linux":
        raise ConfigError("the services of a run are supervised by what Linux alone has (prctl): run it there")
    _refuse_other_model(run)
    check_socket_path(run.socket, "TMPDIR")
    for name in SERVICES:
        _check_files(name, getattr(run, name))
    make_model(run.model)
    restrict_umask()
    # Threads that spin while they wait take the cores from the other processes: steps took three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return asyncio.run(_supervise(run, reload, train, training_log))
    except SupervisorError as error:
        logger.error("%s", error)
        return error.status


async def _supervise(run: LocalRun, reload: Callable[[], LocalRun], train: bool, training_log: Path | None) -> int:
    stopping = asyncio.Event()
    async with Supervisor(run.services_dir, run.drain_timeout_s) as supervisor:
        if renew_taken_ports(run.dir):
            run = reload()
        _write_settings(run)
        stop = partial(_stop, supervisor, stopping)
        with stop_on_signal(stop, supervisor.kill_all), _stopping_when_unread(stop) as is_unread:
            await supervisor.start([_valkey(run), *(_service(run, name) for name in SERVICES)])
            ready = asyncio.create_task(supervisor.wait_ready(SERVICES, partial(push_problems, run)))
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
                return OUTPUT_CLOSED if is_unread() else INTERRUPTED if train else OK
            ready.result()
            if train:
                status = await supervisor.run_to_end(_training(run, training_log))
                if is_unread():
                    return OUTPUT_CLOSED
                return INTERRUPTED if status is None or status < 0 else status
            for name in SERVICES:
                logger.info("%s: admin on http://%s, log in %s", name, run.admin_address(name), run.log(name))
            if (token_file := run.train.endpoints.token_file) is not None:
                logger.info("clients of your own show the run's token: export POISE_TOKEN_FILE=%s", token_file)
            logger.info("up; train with `poise train` and the same options in another terminal, stop with Ctrl-C")
            await supervisor.first_of(stopped)
            return OUTPUT_CLOSED if is_unread() else OK


def _stop(supervisor: Supervisor, stopping: asyncio.Event) -> None:
    stopping.set()
    logger.info("stopping; again to kill everything at once")
    supervisor.end("train")


@contextlib.contextmanager
def _stopping_when_unread(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Stop once the reader of the output has exited; yield a function that returns whether it has."""

    async def look() -> None:
        while not (is_unread(sys.stdout) or is_unread(sys.stderr)):  # noqa: ASYNC110 (a pipe sets no event)
            await asyncio.sleep(_LOOK_AT_OUTPUT_EVERY_S)
        logger.warning("the reader of the output has exited")
        stop()

    looking = asyncio.create_task(look(), name="look-at-output")
    try:
        yield lambda: looking.done()
    finally:
        looking.cancel()


def _settings_file(run: LocalRun, program: str) -> Path:
    return run.services_dir / f"{program}.yaml"


def _write_settings(run: LocalRun) -> None:
    """Write each program's settings where it will read them, and which model the run is of."""
    write_file(_model_file(run), _model_name(run).encode())
    for program, tree in run.trees.items():
        path = _settings_file(run, program)
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))


def _refuse_other_model(run: LocalRun) -> None:
    """Keep a run to the model it began with: its states are of no use to another."""
    model, path = _model_name(run), _model_file(run)
    began_with = path.read_text() if path.exists() else model
    if began_with != model and run.learner.state_dir.exists():
        raise ConfigError(
            f"{run.dir} holds a run of model {began_with}, not {model}; give the new run a name, or folder, of its "
            "own: --set run.name=..."
        )


def _check_files(name: str, config: ServiceConfig) -> None:
    """Read what a service reads first, before anything starts. Raises `ConfigError`."""
    config.auth.open()  # names no service: one file may serve all
    check_readable(config.grpc.tls_cert_file, f"{name}: grpc.tls_cert_file")
    check_readable(config.grpc.tls_key_file, f"{name}: grpc.tls_key_file")


def _model_name(run: LocalRun) -> str:
    """Return what a run's model goes by, wherever the cache and the current folder are."""
    return run.model if run.model in KNOWN_MODELS else str(locate_model(run.model))


def _model_file(run: LocalRun) -> Path:
    return run.services_dir / "model"


def _valkey(run: LocalRun) -> ProcessSpec:
    return ProcessSpec("valkey", valkey_command(run.socket, run.services_dir / "valkey"), run.log("valkey"))


def _service(run: LocalRun, name: str) -> ProcessSpec:
    return ProcessSpec(name, _command(run, name, f"poise.{name}"), run.log(name), run.admin_address(name))


def _training(run: LocalRun, log: Path | None) -> ProcessSpec:
    return ProcessSpec("train", _command(run, "train", "poise.orchestrator"), log, stop_signal=signal.SIGINT)


def _command(run: LocalRun, program: str, module: str) -> list[str]:
    overrides = [part for override in run.overrides[program] for part in ("--set", override)]
    return [sys.executable, "-m", module, "-c", str(_settings_file(run, program)), *overrides]
