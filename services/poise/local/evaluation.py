"""`poise eval`: evaluates what the running services serve, or a model in a temporary generation service.

The temporary service has its own ports and process group, so a run can train at the same time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from poise.local.addresses import address, free_ports
from poise.local.models.catalog import find_model, make_model
from poise.local.processes.process import ProcessSpec, SupervisedProcess, describe_exit
from poise.local.processes.start_log import StartLog
from poise.local.run_file import LocalRun
from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError, SettingsError
from poise.orchestrator.evaluation.eval_command import EvaluatedModel, evaluate_served, evaluation_folder, load_tasks
from poise.orchestrator.job import with_exit_status
from poise.orchestrator.tasks.mixture import Mixture
from poise.runtime.cli.exit_status import OK, WRONG_SETTINGS
from poise.runtime.config.settings import ConfigError
from poise.runtime.files.atomic import restrict_umask

logger = logging.getLogger(__name__)

LATEST = "latest"
"""The value of `--checkpoint` for the newest checkpoint of the run."""

_POLL_S = 0.1
_LOG_EVERY_S = 15.0
_STOP_TIMEOUT_S = 20.0


def evaluate_run(run: LocalRun, model: str | None, checkpoint: str | None, out: Path | None, as_json: bool) -> int:
    """Evaluate `model`, a checkpoint, or by default the served policy; return the exit status.

    Raises:
        ConfigError: `model` and `checkpoint` are both set.
    """
    if model is not None and checkpoint is not None:
        raise ConfigError("--model and --checkpoint are both set. Keep one")

    def work() -> int:
        mixture = load_tasks(run.train)
        location = None if model is None else find_model(model, "--model", "for a checkpoint use `--checkpoint`")
        restrict_umask()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        what = "checkpoint" if checkpoint is not None else "served" if model is None else Path(model).name
        target = (run.dir / "evaluations" / f"{what}-{stamp}" if out is None else out.expanduser()).resolve()
        with ExitStack() as stack:
            folder = stack.enter_context(evaluation_folder(target))
            if checkpoint is not None:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".model-", dir=folder)))
                subject = _export(run, checkpoint, scratch / "model")
                asyncio.run(_evaluate_model(run, mixture, subject, scratch / "model", folder, as_json))
            elif location is not None:
                subject = EvaluatedModel(str(location), is_policy=False)
                asyncio.run(_evaluate_model(run, mixture, subject, location, folder, as_json))
            else:
                subject = EvaluatedModel(f"the policy that run {run.name} serves", is_policy=True)
                asyncio.run(evaluate_served(run.train, mixture, subject, folder, as_json))
        return OK

    return with_exit_status(run.train, work)


def _export(run: LocalRun, checkpoint: str, target: Path) -> EvaluatedModel:
    from poise.errors import BackendDown
    from poise.learner.storage.checkpoint import StateError
    from poise.learner.storage.export import export_checkpoint, newest_checkpoint

    folder = run.learner.state_dir if checkpoint == LATEST else Path(checkpoint).expanduser()
    if checkpoint != LATEST and not folder.is_dir():
        raise ConfigError(
            f"--checkpoint: {checkpoint} does not exist. Name a checkpoint-… folder, or omit FOLDER for the newest"
        )
    make_model(run.model)
    try:
        path, content = newest_checkpoint(folder)
        logger.info("exporting %s, policy version %d", path, content.progress.policy_version)
        export_checkpoint(run.learner, path, content, target)
    except (StateError, BackendDown) as error:
        raise RunError(f"--checkpoint: {error}") from error
    return EvaluatedModel(str(path.resolve()), is_policy=False, policy_version=content.progress.policy_version)


async def _evaluate_model(
    run: LocalRun, mixture: Mixture, subject: EvaluatedModel, model: Path | str, folder: Path, as_json: bool
) -> None:
    """Serve a model, evaluate it, and stop serving it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory(prefix="poise-eval-") as scratch:
        spec, train = _temporary_service(run, model, folder, Path(scratch) / "generation.yaml")
        logger.info("starting a generation service for %s (log: %s)", subject.name, spec.log)
        process = await SupervisedProcess.start(spec)
        ended = asyncio.create_task(process.wait())
        measuring = asyncio.create_task(_measure_when_ready(process, train, mixture, subject, folder, as_json))
        try:
            await asyncio.wait({measuring, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not measuring.done():
                kind = SettingsError if ended.result() == WRONG_SETTINGS else RunError
                raise kind(
                    f"generation {describe_exit(ended.result())}. The end of its log, {spec.log}:\n{process.log_tail()}"
                )
            measuring.result()
        finally:
            measuring.cancel()
            ended.cancel()
            await asyncio.gather(measuring, ended, return_exceptions=True)
            await process.stop(_STOP_TIMEOUT_S)


async def _measure_when_ready(
    process: SupervisedProcess,
    train: OrchestratorConfig,
    mixture: Mixture,
    subject: EvaluatedModel,
    folder: Path,
    as_json: bool,
) -> None:
    log = StartLog(_LOG_EVERY_S)
    while True:
        ready, reason = await process.is_ready()
        if ready:
            break
        if log.is_due([reason]):
            logger.info("waiting for generation: %s", reason)
        await asyncio.sleep(_POLL_S)
    await evaluate_served(train, mixture, subject, folder, as_json)


def _temporary_service(
    run: LocalRun, model: Path | str, folder: Path, settings: Path
) -> tuple[ProcessSpec, OrchestratorConfig]:
    """Return the service to start, with the run's settings except the model, and the settings to evaluate it."""
    grpc_port, admin_port = free_ports(2)
    settings.touch(mode=0o600)
    settings.write_text(yaml.safe_dump(dict(run.trees["generation"]), sort_keys=False))
    # On the command line, which takes precedence over the environment.
    own: Mapping[str, Any] = {
        "model": str(model),
        "wait_for_learner": False,
        "grpc.port": grpc_port,
        "admin.port": admin_port,
    }
    overrides = [*run.overrides["generation"], *(f"{name}={json.dumps(value)}" for name, value in own.items())]
    flags = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "poise.generation", "-c", str(settings), *flags]
    admin = address(run.generation.admin.model_copy(update={"port": admin_port}))
    served = address(run.generation.grpc.model_copy(update={"port": grpc_port}))
    endpoints = run.train.endpoints.model_copy(update={"generation": (served,)})
    spec = ProcessSpec("generation", command, folder / "generation.log", admin)
    return spec, run.train.model_copy(update={"endpoints": endpoints})
