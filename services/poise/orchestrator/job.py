"""A run from its settings to its report: constructs the parts, drives the loop, ends with a summary.

Owns signals and exit statuses; the loop is `loop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.errors import RunError
from poise.orchestrator.evaluating import Evaluator
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.progress import ConsoleWatcher, clock, speaker
from poise.orchestrator.report import TensorBoardLog, summarise, write_report, write_summary
from poise.orchestrator.run_folder import RunFolder, RunState
from poise.orchestrator.sampling import StepSampler
from poise.orchestrator.scoring import Scorer
from poise.orchestrator.services import Services
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise.orchestrator.verifiers.pool import VerifierPool
from poise.orchestrator.waiting import StoppedWaiting
from poise.runtime.config import ConfigError
from poise.runtime.config_text import redacted
from poise.runtime.console import OutputConsole
from poise.runtime.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISCONFIGURED, EXIT_OK, EXIT_OUTPUT_CLOSED
from poise.runtime.logging import configure_logging
from poise.runtime.output import OutputClosed
from poise.runtime.signals import stopping_by_signal
from poise.runtime.tracing import configure_tracing
from poise_client.errors import PoiseClientError
from poise_client.types import ModelExport

logger = logging.getLogger(__name__)

T = TypeVar("T")

OK, FAILED, WRONG_SETTINGS, INTERRUPTED = EXIT_OK, EXIT_FAILED, EXIT_MISCONFIGURED, EXIT_INTERRUPTED


def train(config: OrchestratorConfig) -> int:
    """Run, or resume, to the end or until a signal; return the exit status."""
    return guarded(config, lambda: asyncio.run(_train(config, Mixture(config.tasks, config.seed))))


def settle(config: OrchestratorConfig) -> int | None:
    """Return the exit status of a run that needs no services: finished before, or wrong. None for all others.

    Says why, and of a finished run what came of it.
    """

    def look() -> int | None:
        mixture = Mixture(config.tasks, config.seed)
        mixture.held_out(config.evaluation.num_prompts)
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
        return EXIT_OUTPUT_CLOSED
    except (ConfigError, TaskError) as error:
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
    folder = RunFolder(config.run_dir)
    state = folder.open(config.run_id, redacted(config))
    verifiers = VerifierPool(config.verifier)
    with contextlib.closing(folder):
        if state.is_finished(config.limits):
            _say_finished(config, state)
            return OK
        board = TensorBoardLog(config.run_dir / "tensorboard")
        watcher = _Watcher(board, config, state.next_step)
        stopping = asyncio.Event()
        async with Services(config.endpoints, stopping) as services, verifiers:
            scorer = Scorer(services, verifiers)
            sampler = StepSampler(config, folder.journal, services, mixture, scorer, watcher)
            evaluator = Evaluator(config, folder, mixture, scorer, watcher)
            loop = TrainingLoop(config, folder, services, sampler, evaluator, watcher, stopping)
            with watcher, contextlib.closing(board), stopping_by_signal(partial(_stop_after_step, stopping, watcher)):
                try:
                    await services.wait_until_up(with_value=config.algorithm.needs_probe)
                    if state.next_step:
                        watcher.say(f"resuming at {config.limits.describe(state.spent)}")
                    export = await _finish(config, folder, services) if await loop.run(state) else None
                except StoppedWaiting:
                    export = None
                if export is None:
                    watcher.say(f"stopped before the end; the same command resumes. Run folder: {config.run_dir}")
                    return INTERRUPTED
        _keep_model(Path(export.path), config.run_dir / "model")
        write_summary(config.run_dir)
        report = write_report(config.run_dir)
        folder.mark_reported()
    _say_summary(config, export.path, report)
    return OK


async def _finish(config: OrchestratorConfig, folder: RunFolder, services: Services) -> ModelExport:
    """Write down what only services know in the end, and have the model exported."""
    if config.algorithm.needs_probe:
        folder.write_probes(await services.probe_report())
    return await services.export_model("model")


def _stop_after_step(stopping: asyncio.Event, watcher: ConsoleWatcher) -> None:
    stopping.set()
    with contextlib.suppress(OutputClosed):
        watcher.say("stopping after what is in hand; again to stop at once")  # all of a sampled step is on disk


def _keep_model(exported: Path, target: Path) -> None:
    """Bring an export into the run folder where the learner's file system is this one."""
    if exported != target.resolve() and exported.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(exported, target)


def _say_finished(config: OrchestratorConfig, state: RunState) -> None:
    _say_summary(config, str(config.run_dir / "model"), config.run_dir / "report.html")
    speaker(OutputConsole(), config.logging)(
        f"\nThis run is finished: {state.next_step} steps. Higher limits (num_steps, budget) go on with it; another "
        "name and folder start anew."
    )


def _say_summary(config: OrchestratorConfig, model: str, report: Path) -> None:
    summary = summarise(config.run_dir)
    say = speaker(OutputConsole(), config.logging)
    say("")
    say(f"run {config.run_id}: {summary['num_steps']} steps in {clock(summary['wall_s'])}")
    if held_out := summary.get("held_out"):
        say(f"held-out reward  {describe_held_out(held_out)}")
    say(f"report           {report}")
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
