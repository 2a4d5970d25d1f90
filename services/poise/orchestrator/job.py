"""A run from its settings to its report: constructs the parts, drives the loop, ends with a summary.

Owns signals and exit statuses; the loop is `loop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError, SettingsError
from poise.orchestrator.evaluation.evaluator import Evaluator
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.progress import ConsoleWatcher, clock, speaker
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.sampling.sampler import StepSampler
from poise.orchestrator.sampling.scoring import Scorer
from poise.orchestrator.sampling.service_clients import Services
from poise.orchestrator.sampling.waiting import StoppedWaiting
from poise.orchestrator.storage.disk_retry import Storage
from poise.orchestrator.storage.final_outputs import MODEL, keep_model, try_outputs
from poise.orchestrator.storage.run_folder import RunFolder, RunState
from poise.orchestrator.tasks.data_check import check_data
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise.orchestrator.untrained_steps import UntrainedSteps
from poise.report import TensorBoardLog, summarise, write_report, write_summary
from poise.runtime.cli.broken_pipe import OutputClosed
from poise.runtime.cli.console import OutputConsole
from poise.runtime.cli.exit_status import FAILED, INTERRUPTED, OK, OUTPUT_CLOSED, WRONG_SETTINGS
from poise.runtime.cli.signals import stop_on_signal
from poise.runtime.config.settings import ConfigError
from poise.runtime.config.text import redacted
from poise.runtime.logging import configure_logging
from poise.runtime.tracing import configure_tracing
from poise_client.errors import InvalidRequestError, PoiseClientError
from poise_client.types import ModelExport

logger = logging.getLogger(__name__)

T = TypeVar("T")


def train(config: OrchestratorConfig) -> int:
    """Run, or resume, to the end or until a signal; return the exit status."""
    return guarded(config, lambda: asyncio.run(_train(config, Mixture(config.tasks, config.seed, config.on_bad_row))))


def settle(config: OrchestratorConfig) -> int | None:
    """Return the exit status of a run that needs no services: finished before, or wrong. None for all others.

    Says why, and of a finished run what came of it.
    """

    def look() -> int | None:
        Mixture(config.tasks, config.seed, config.on_bad_row).held_out(config.evaluation.num_prompts)
        state = RunFolder(config.run_dir).read_state(config.run_id)
        if not state.is_finished(config.limits):
            return None
        _say_finished(config, state)
        return OK

    return guarded(config, look)


def guarded(config: OrchestratorConfig, work: Callable[[], T]) -> T | int:
    """Return what `work` does, or the exit status of what kept it from that, which the log tells."""
    configure_logging(config.logging)
    configure_tracing(config.tracing, "train")
    try:
        return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except OutputClosed:
        logger.warning("stopped, for nobody reads the output any more; the same command resumes")
        return OUTPUT_CLOSED
    except (ConfigError, TaskError, SettingsError, InvalidRequestError) as error:
        logger.error("%s", error)
        return WRONG_SETTINGS
    except (RunError, PoiseClientError) as error:
        logger.error("%s", error)
        return FAILED


class _Watcher(ConsoleWatcher):
    """The terminal, and TensorBoard."""

    def __init__(self, board: TensorBoardLog, config: OrchestratorConfig, first_step: int) -> None:
        super().__init__(config.limits, first_step, OutputConsole(), config.logging)
        self._board = board

    def step_done(self, numbers: dict[str, Any]) -> None:
        """See `Watcher`."""
        self._board.write(numbers)
        super().step_done(numbers)


async def _train(config: OrchestratorConfig, mixture: Mixture) -> int:
    folder, stopping = RunFolder(config.run_dir), asyncio.Event()
    state = folder.open(config.run_id, redacted(config))
    with contextlib.closing(folder):
        if state.is_finished(config.limits):
            _say_finished(config, state)
            return OK
        with contextlib.closing(try_outputs(config, mixture)) as board:
            watcher = _Watcher(board, config, state.next_step)
            with watcher, stop_on_signal(partial(_stop_after_step, stopping, watcher)):
                try:
                    export = await _train_and_report(config, mixture, folder, state, watcher, stopping)
                except StoppedWaiting:
                    export = None
                if export is None:
                    watcher.say(f"stopped before the end; the same command resumes. Run folder: {config.run_dir}")
                    return INTERRUPTED
    _say_summary(config, export.path)
    return OK


async def _train_and_report(
    config: OrchestratorConfig,
    mixture: Mixture,
    folder: RunFolder,
    state: RunState,
    watcher: _Watcher,
    stopping: asyncio.Event,
) -> ModelExport | None:
    """Train to the end and write what is left of the run; return its model, None if it was stopped before."""
    storage = Storage(stopping, folder.check_held)
    async with Services(config.endpoints, stopping) as services, VerifierPool(config.verifier) as verifiers:
        scorer = Scorer(services, verifiers)
        sampler = StepSampler(config, folder.journal, services, mixture, scorer, watcher, storage)
        evaluator = Evaluator(config, folder, mixture, scorer, watcher, storage)
        loop = TrainingLoop(config, folder, services, sampler, evaluator, watcher, stopping, storage)
        await services.wait_until_up(with_value=config.algorithm.needs_probe)
        await services.check_export(MODEL)
        await check_data(config, mixture, services, watcher.say)
        await storage.keep(partial(folder.record_data, mixture.files, state.next_step))
        if state.next_step:
            watcher.say(f"resuming at {config.limits.describe(state.spent)}")
        if not await loop.run(state):
            return None
        UntrainedSteps(config.max_untrained_steps, folder.read_metrics()).check_end()
        if config.algorithm.needs_probe:
            await storage.keep(partial(folder.write_probes, await services.probe_report()))
        export = await services.export_model(MODEL)
    await storage.keep(partial(keep_model, Path(export.path), config.run_dir / MODEL))
    await storage.keep(partial(write_summary, config.run_dir))
    await storage.keep(partial(write_report, config.run_dir))
    await storage.keep(folder.mark_reported)
    return export


def _stop_after_step(stopping: asyncio.Event, watcher: ConsoleWatcher) -> None:
    stopping.set()
    with contextlib.suppress(OutputClosed):
        watcher.say("stopping after what is in hand; again to stop at once")  # all of a sampled step is on disk


def _say_finished(config: OrchestratorConfig, state: RunState) -> None:
    _say_summary(config, str(config.run_dir / MODEL))
    speaker(OutputConsole(), config.logging)(
        f"\nThis run is finished: {state.next_step} steps. Higher limits (num_steps, budget) go on with it; another "
        "name and folder start anew."
    )


def _say_summary(config: OrchestratorConfig, model: str) -> None:
    summary = summarise(config.run_dir)
    say = speaker(OutputConsole(), config.logging)
    say("")
    say(f"run {config.run_id}: {summary['num_steps']} steps in {clock(summary['wall_s'])}")
    if held_out := summary.get("held_out"):
        say(f"held-out reward  {describe_held_out(held_out)}")
    say(f"report           {config.run_dir / 'report.html'}")
    say(f"model            {model}")
    say(f"curves           tensorboard --logdir {config.run_dir / 'tensorboard'}")


def describe_held_out(held_out: dict[str, Any]) -> str:
    """Say how the held-out reward changed."""
    before, after, change = held_out.get("before"), held_out.get("after"), held_out.get("difference")
    if not before or not after or not change:
        return "was not measured both before and after"
    return (
        f"{before['mean']:.3f} ({before['low']:.3f} to {before['high']:.3f}) -> "
        f"{after['mean']:.3f} ({after['low']:.3f} to {after['high']:.3f}), "
        f"change {change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
    )
