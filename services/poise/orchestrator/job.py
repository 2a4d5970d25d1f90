"""Runs a training job: builds its parts, runs the loop, writes the report and returns an exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError, SettingsError, file_error_kind
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.progress import ConsoleProgress, format_duration, line_printer
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.run_checks import UntrainedSteps
from poise.orchestrator.sampling.retry import StopRequested
from poise.orchestrator.sampling.service_clients import ServiceClients
from poise.orchestrator.storage.disk_retry import DiskRetry
from poise.orchestrator.storage.model_copy import MODEL, check_model_path, copy_model
from poise.orchestrator.storage.run_folder import RunFolder, RunState
from poise.orchestrator.tasks.data_check import check_data
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise.report import TensorBoardLog, render_report, summarise, write_report, write_summary
from poise.runtime.cli.broken_pipe import OutputClosed
from poise.runtime.cli.console import OutputConsole
from poise.runtime.cli.exit_status import FAILED, INTERRUPTED, OK, OUTPUT_CLOSED, WRONG_SETTINGS
from poise.runtime.cli.signals import stop_on_signal
from poise.runtime.config.settings import ConfigError
from poise.runtime.config.text import redacted
from poise.runtime.files.atomic import describe_disk_error
from poise.runtime.logging import configure_logging
from poise.runtime.tracing import configure_tracing
from poise_client.errors import InvalidRequestError, PoiseClientError
from poise_client.types import ModelExport

logger = logging.getLogger(__name__)

T = TypeVar("T")


def train(config: OrchestratorConfig) -> int:
    """Run, or resume, until the end or a signal; return the exit status."""
    return with_exit_status(config, lambda: asyncio.run(_train(config, _mixture(config))))


def early_exit_status(config: OrchestratorConfig) -> int | None:
    """Return the exit status of a run that is finished or cannot start; None if it needs the services.

    Prints the summary of a finished run, or the error.
    """

    def check() -> int | None:
        _mixture(config).held_out(config.evaluation.num_prompts)
        state = RunFolder(config.run_dir).read_state(config.run_id)
        if not state.is_finished(config.limits):
            return None
        _print_finished(config, state)
        return OK

    return with_exit_status(config, check)


def with_exit_status(config: OrchestratorConfig, work: Callable[[], T]) -> T | int:
    """Return the result of `work`; if it fails, log the error and return the exit status for it."""
    configure_logging(config.logging)
    configure_tracing(config.tracing, "train")
    try:
        return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except OutputClosed:
        logger.warning("stopped because the process that reads the output exited. Run the same command to resume")
        return OUTPUT_CLOSED
    except (ConfigError, TaskError, SettingsError, InvalidRequestError) as error:
        logger.error("%s", error)
        return WRONG_SETTINGS
    except (RunError, PoiseClientError) as error:
        logger.error("%s", error)
        return FAILED


class _Progress(ConsoleProgress):
    """Progress on the terminal, and curves for TensorBoard."""

    def __init__(self, curves: TensorBoardLog, config: OrchestratorConfig, first_step: int) -> None:
        super().__init__(config.limits, first_step, OutputConsole(), config.logging)
        self._curves = curves

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        """See `Callbacks`."""
        self._curves.write(metrics)
        super().on_step_end(metrics)


def _mixture(config: OrchestratorConfig) -> Mixture:
    return Mixture(config.tasks, config.seed, config.on_bad_row)


async def _train(config: OrchestratorConfig, mixture: Mixture) -> int:
    folder, stopping = RunFolder(config.run_dir), asyncio.Event()
    state = folder.open(config.run_id, redacted(config))
    with contextlib.closing(folder):
        if state.is_finished(config.limits):
            _print_finished(config, state)
            return OK
        with contextlib.closing(_check_outputs(config, mixture)) as curves:
            progress = _Progress(curves, config, state.next_step)
            with progress, stop_on_signal(partial(_stop_after_step, stopping, progress)):
                try:
                    export = await _train_and_report(config, mixture, folder, state, progress, stopping)
                except StopRequested:
                    export = None
                if export is None:
                    progress.print(f"stopped early. Run the same command to resume. Run folder: {config.run_dir}")
                    return INTERRUPTED
    _print_summary(config, export.path)
    return OK


async def _train_and_report(
    config: OrchestratorConfig,
    mixture: Mixture,
    folder: RunFolder,
    state: RunState,
    progress: _Progress,
    stopping: asyncio.Event,
) -> ModelExport | None:
    """Train to the end, and write model, summary and report. Return the model, or None if the run was stopped early."""
    disk = DiskRetry(stopping, folder.check_open)
    async with ServiceClients(config.endpoints, stopping) as services, VerifierPool(config.verifier) as verifiers:
        loop = TrainingLoop(config, folder, services, verifiers, mixture, progress, stopping)
        await services.wait_until_up(with_value=config.algorithm.needs_probe)
        await services.check_export(MODEL)
        await check_data(config, mixture, services, progress.print)
        await disk.run(partial(folder.record_data, mixture.files, state.next_step))
        if state.next_step:
            progress.print(f"resuming at {config.limits.describe(state.usage)}")
        if not await loop.run(state):
            return None
        UntrainedSteps(config.max_untrained_steps, folder.read_metrics()).check_end()
        if config.algorithm.needs_probe:
            await disk.run(partial(folder.write_probes, await services.probe_report()))
        export = await services.export_model(MODEL)
    await disk.run(partial(copy_model, Path(export.path), config.run_dir / MODEL))
    await disk.run(partial(write_summary, config.run_dir))
    await disk.run(partial(write_report, config.run_dir))
    await disk.run(folder.mark_reported)
    return export


def _check_outputs(config: OrchestratorConfig, mixture: Mixture) -> TensorBoardLog:
    """Check that all outputs can be written, and return the open TensorBoard log. Call it before the first step.

    Raises:
        SettingsError: a library is missing, or another file is at the path of the model.
        RunError: a file or folder is not writable.
        TaskError: there are too few held-out problems.
    """
    mixture.held_out(config.evaluation.num_prompts)
    check_model_path(config.run_dir)
    try:
        render_report(config.run_dir)
        return TensorBoardLog(config.run_dir / "tensorboard")
    except ImportError as error:
        raise SettingsError(f"the report needs a library that is missing: {error}. Install it") from error
    except OSError as error:
        raise file_error_kind(error)(
            f"{config.run_dir}/tensorboard is not writable: {describe_disk_error(error)}. Then run the same command "
            "again"
        ) from error


def _stop_after_step(stopping: asyncio.Event, progress: ConsoleProgress) -> None:
    stopping.set()
    with contextlib.suppress(OutputClosed):
        progress.print("stopping after the current step; interrupt again to stop at once")  # sampled steps are on disk


def _print_finished(config: OrchestratorConfig, state: RunState) -> None:
    _print_summary(config, str(config.run_dir / MODEL))
    line_printer(OutputConsole(), config.logging)(
        f"\nThis run is finished after {state.next_step} steps. Raise its limits (num_steps, budget) to continue "
        "it, or use another name and folder for a new run."
    )


def _print_summary(config: OrchestratorConfig, model: str) -> None:
    summary = summarise(config.run_dir)
    print_line = line_printer(OutputConsole(), config.logging)
    print_line("")
    print_line(f"run {config.run_id}: {summary['num_steps']} steps in {format_duration(summary['wall_s'])}")
    if held_out := summary.get("held_out"):
        print_line(f"held-out reward  {describe_held_out(held_out)}")
    print_line(f"report           {config.run_dir / 'report.html'}")
    print_line(f"model            {model}")
    print_line(f"curves           tensorboard --logdir {config.run_dir / 'tensorboard'}")


def describe_held_out(held_out: dict[str, Any]) -> str:
    """Return the change of the held-out reward as text."""
    before, after, change = held_out.get("before"), held_out.get("after"), held_out.get("difference")
    if not before or not after or not change:
        return "was not measured both before and after training"
    return (
        f"{before['mean']:.3f} ({before['low']:.3f} to {before['high']:.3f}) -> "
        f"{after['mean']:.3f} ({after['low']:.3f} to {after['high']:.3f}), "
        f"change {change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
    )
