"""A run from its settings to its report: constructs the parts, drives the loop, ends with a summary.

Owns signals and exit statuses; the loop is `loop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from poise.orchestrator.config import OrchestratorConfig
from poise.orchestrator.loop import TrainingLoop
from poise.orchestrator.progress import ConsoleWatcher, clock
from poise.orchestrator.report import TensorBoardLog, summarise, write_report, write_summary
from poise.orchestrator.report.statistics import bootstrap_interval
from poise.orchestrator.run_folder import RunError, RunFolder
from poise.orchestrator.services import Services
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError
from poise.orchestrator.verifiers.pool import VerifierPool
from poise.runtime.config import ConfigError, redacted
from poise.runtime.logging import configure_logging
from poise_client.errors import PoiseClientError

logger = logging.getLogger(__name__)

OK, FAILED, WRONG_SETTINGS, INTERRUPTED = 0, 1, 2, 130


def train(config: OrchestratorConfig) -> int:
    """Run, or resume, to the end or until a signal; return the exit status."""
    return _guarded(config, _train)


def evaluate(config: OrchestratorConfig) -> int:
    """Measure the policy served now on the held-out prompts, and print it; return the exit status."""
    return _guarded(config, _evaluate)


def show_finished(config: OrchestratorConfig) -> bool:
    """Whether a run had come to its end before; if so, say what came of it and how to start anew."""
    state_file, report = config.run_dir / "state.json", config.run_dir / "report.html"
    if not (state_file.exists() and report.exists()):
        return False
    if json.loads(state_file.read_text()).get("next_step", 0) < config.num_steps:
        return False
    console = Console(file=sys.stdout)
    _say_summary(console, config, str(config.run_dir / "model"), report)
    console.print("\nThis run is finished. For another, give it another name: --set run.name=...", highlight=False)
    return True


def _guarded(
    config: OrchestratorConfig, work: Callable[[OrchestratorConfig, Mixture], Coroutine[Any, Any, int]]
) -> int:
    configure_logging(config.logging)
    try:
        mixture = Mixture(config.tasks, config.seed)
        return asyncio.run(work(config, mixture))
    except (ConfigError, TaskError) as error:
        logger.error("%s", error)
        return WRONG_SETTINGS
    except (RunError, PoiseClientError) as error:
        logger.error("%s", error)
        return FAILED


class _Watcher(ConsoleWatcher):
    """The terminal, and TensorBoard."""

    def __init__(self, board: TensorBoardLog, num_steps: int, first_step: int, console: Console) -> None:
        super().__init__(num_steps, first_step, console)
        self._board = board

    def step_done(self, numbers: dict[str, Any]) -> None:
        """See `Watcher`."""
        self._board.write(numbers)
        super().step_done(numbers)


async def _train(config: OrchestratorConfig, mixture: Mixture) -> int:
    folder = RunFolder(config.run_dir)
    state = folder.open(config.run_id, redacted(config))
    console = Console(file=sys.stdout)
    verifiers = VerifierPool(config.verifier)
    with contextlib.closing(folder):
        board = TensorBoardLog(config.run_dir / "tensorboard")
        watcher = _Watcher(board, config.num_steps, state.next_step, console)
        async with Services(config.endpoints) as services:
            loop = TrainingLoop(config, folder, services, mixture, verifiers, watcher)
            with watcher, contextlib.closing(board), _signals(loop, watcher):
                await services.wait_until_up(with_value=config.algorithm == "poise")
                await verifiers.start()
                try:
                    if state.next_step:
                        watcher.say(f"resuming at step {state.next_step} of {config.num_steps}")
                    finished = await loop.run(state.next_step, state.wall_s)
                    if not finished:
                        watcher.say(f"stopped before the end; the same command resumes. Run folder: {config.run_dir}")
                        return INTERRUPTED
                    export = await services.export_model("model")
                finally:
                    await verifiers.stop()
        _keep_model(Path(export.path), config.run_dir / "model")
        write_summary(config.run_dir)
        report = write_report(config.run_dir)
    _say_summary(console, config, export.path, report)
    return OK


async def _evaluate(config: OrchestratorConfig, mixture: Mixture) -> int:
    console = Console(file=sys.stdout)
    verifiers = VerifierPool(config.verifier)
    watcher = ConsoleWatcher(1, 0, console)
    async with Services(config.endpoints) as services:
        loop = TrainingLoop(config, RunFolder(config.run_dir), services, mixture, verifiers, watcher)
        with watcher:
            await services.wait_until_up(with_value=False)
            await verifiers.start()
            try:
                status = await services.learner_status()
                line = await loop.measure("now", status.policy_version, status.policy_version)
            finally:
                await verifiers.stop()
    interval = bootstrap_interval(line["rewards"])
    console.print(
        f"policy version {line['policy_version']}: held-out reward {interval.mean:.3f} "
        f"(95 % interval {interval.low:.3f} to {interval.high:.3f}) on {line['num_prompts']} prompts x "
        f"{line['rollouts_per_prompt']}",
        highlight=False,
        soft_wrap=True,
    )
    for domain, mean in line["by_domain"].items():
        console.print(f"  {domain}: {mean:.3f}", highlight=False)
    return OK


@contextlib.contextmanager
def _signals(loop: TrainingLoop, watcher: ConsoleWatcher) -> Iterator[None]:
    running = asyncio.get_running_loop()

    def on_signal() -> None:
        if loop.stopping.is_set():
            os._exit(INTERRUPTED)  # all of a finished step is on disk
        loop.stopping.set()
        watcher.say("stopping after this step; again to stop at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        running.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            running.remove_signal_handler(number)


def _keep_model(exported: Path, target: Path) -> None:
    """Bring an export into the run folder where the learner's file system is this one."""
    if exported != target.resolve() and exported.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(exported, target)


def _say_summary(console: Console, config: OrchestratorConfig, model: str, report: Path) -> None:
    summary = summarise(config.run_dir)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say("")
    say(f"run {config.run_id}: {config.num_steps} steps in {clock(summary['wall_s'])}")
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
