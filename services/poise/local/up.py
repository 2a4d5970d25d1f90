"""`poise up` and `poise run`: start the services of a run on this machine, and optionally train."""

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
from poise.runtime.cli.broken_pipe import has_no_reader
from poise.runtime.cli.exit_status import INTERRUPTED, OK, OUTPUT_CLOSED
from poise.runtime.cli.signals import stop_on_signal
from poise.runtime.config.settings import ConfigError, ServiceConfig, check_readable
from poise.runtime.files.atomic import restrict_umask, write_file
from poise.runtime.network.unix_sockets import check_socket_path

logger = logging.getLogger(__name__)

_OUTPUT_POLL_S = 1.0


def run_services(
    run: LocalRun, reload: Callable[[], LocalRun], *, train: bool, training_log: Path | None = None
) -> int:
    """Start the services; then train and stop them, or keep them running until a signal. Return the exit status.

    Args:
        run: the run.
        reload: returns the run with new ports, after its ports have changed.
        train: train, and stop the services at the end.
        training_log: file for the output of training; None writes it to the terminal.

    Raises:
        ConfigError: the model cannot be created, the folder contains a run of another model, a socket's path is too
            long, a token or certificate file cannot be read, or this is not Linux.
    """
    if platform.system() != "Linux":
        raise ConfigError(f"this is {platform.system()}, but supervising the services requires Linux (prctl)")
    _reject_other_model(run)
    check_socket_path(run.socket, "TMPDIR")
    for name in SERVICES:
        _check_files(name, getattr(run, name))
    make_model(run.model)
    restrict_umask()
    # Threads that spin while waiting take cores from the other processes: steps took three times as long.
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
        with stop_on_signal(stop, supervisor.kill_all), _stop_without_reader(stop) as lost_reader:
            await supervisor.start([_valkey(run), *(_service(run, name) for name in SERVICES)])
            ready = asyncio.create_task(supervisor.wait_ready(SERVICES, partial(push_problems, run)))
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
                return OUTPUT_CLOSED if lost_reader() else INTERRUPTED if train else OK
            ready.result()
            if train:
                status = await supervisor.run_until_exit(_training(run, training_log))
                if lost_reader():
                    return OUTPUT_CLOSED
                return INTERRUPTED if status is None or status < 0 else status
            for name in SERVICES:
                logger.info("%s: admin app on http://%s, log in %s", name, run.admin_address(name), run.log(name))
            if (token_file := run.train.endpoints.token_file) is not None:
                logger.info("token for your own clients: export POISE_TOKEN_FILE=%s", token_file)
            logger.info("ready. Train with `poise train` and the same options in another terminal; stop with Ctrl-C")
            await supervisor.wait_unless_failed(stopped)
            return OUTPUT_CLOSED if lost_reader() else OK


def _stop(supervisor: Supervisor, stopping: asyncio.Event) -> None:
    stopping.set()
    logger.info("stopping. Press Ctrl-C again to kill all processes at once")
    supervisor.end("train")


@contextlib.contextmanager
def _stop_without_reader(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Call `stop` when the reader of the output has exited; yield a function that returns whether it has."""

    async def poll() -> None:
        while not (has_no_reader(sys.stdout) or has_no_reader(sys.stderr)):  # noqa: ASYNC110 (a pipe sets no event)
            await asyncio.sleep(_OUTPUT_POLL_S)
        logger.warning("the reader of the output has exited; stopping")
        stop()

    polling = asyncio.create_task(poll(), name="poll-output")
    try:
        yield polling.done
    finally:
        polling.cancel()


def _settings_file(run: LocalRun, program: str) -> Path:
    return run.services_dir / f"{program}.yaml"


def _write_settings(run: LocalRun) -> None:
    """Write the settings file of each program, and the name of the run's model."""
    write_file(_model_file(run), _model_name(run).encode())
    for program, tree in run.trees.items():
        path = _settings_file(run, program)
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))


def _reject_other_model(run: LocalRun) -> None:
    """Raise `ConfigError` if the run started with another model: its state would not fit."""
    model, path = _model_name(run), _model_file(run)
    first_model = path.read_text() if path.exists() else model
    if first_model != model and run.learner.state_dir.exists():
        raise ConfigError(
            f"{run.dir} contains a run of model {first_model}, not {model}. Give the new run another name: "
            "--set run.name=..."
        )


def _check_files(name: str, config: ServiceConfig) -> None:
    """Check the token and certificate files of a service before anything starts. Raises `ConfigError`."""
    config.auth.open()  # the message names no service: all may share the file
    check_readable(config.grpc.tls_cert_file, f"{name}: grpc.tls_cert_file")
    check_readable(config.grpc.tls_key_file, f"{name}: grpc.tls_key_file")


def _model_name(run: LocalRun) -> str:
    """Return the name of a run's model, independent of the cache and the current folder."""
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
