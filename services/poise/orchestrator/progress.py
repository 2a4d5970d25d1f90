"""What people see while a run goes: a line a step, and on a terminal a live line below it; or what collectors do."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from poise.orchestrator.budget import Limits, Spent
from poise.orchestrator.untrained_steps import describe_rejections
from poise.runtime.config.settings import LoggingConfig
from poise.runtime.logging import log_ids

logger = logging.getLogger(__name__)

_RECENT_STEPS = 10
_HEADER = "  step  reward  mean10  baseline      r var/none stale   tok/s  s/step     left"
"""r: correlation of predicted and realised value; var/none: advantage variance, as a share of that without baseline."""


class ConsoleWatcher:
    """Shows a run on a terminal, or line by line where there is none. Use as a context manager.

    Where the log is JSON, for collectors, it goes there, as a sentence a step in place of the table.
    """

    def __init__(self, limits: Limits, first_step: int, console: Console, log: LoggingConfig) -> None:
        self._limits = limits
        self._console = console
        self._say = speaker(console, log)
        self._is_logged = log.format == "json"
        self._rewards: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._headed = False
        self._phases: dict[int, str] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=self._is_logged or not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("starting", total=limits.num_steps, completed=first_step)

    def __enter__(self) -> ConsoleWatcher:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self._say(text)

    def phase(self, step: int, name: str) -> None:
        """See `Watcher`."""
        self._phases[step] = name
        shown = ", ".join(f"step {at}: {phase}" for at, phase in sorted(self._phases.items()))
        self._progress.update(self._task, description=shown)

    def sampled(self, step: int, done: int, total: int) -> None:
        """See `Watcher`."""
        self.phase(step, f"generate {done}/{total}")

    def step_done(self, numbers: dict[str, Any]) -> None:
        """See `Watcher`."""
        self._rewards.append(numbers["reward"]["mean"])
        self._seconds.append(numbers["time_s"]["total"])
        self._phases.pop(numbers["step"], None)
        num_done = numbers["step"] + 1
        num_left = self._limits.num_steps_left(Spent(num_done, numbers["tokens"], numbers["wall_s"]))
        self._progress.update(self._task, completed=num_done, total=num_done + round(num_left))
        with log_ids(step=numbers["step"]):
            self._tell(numbers, num_left)

    def evaluated(self, line: dict[str, Any]) -> None:
        """See `Watcher`."""
        from poise.report.statistics import bootstrap_interval

        interval = bootstrap_interval(line["rewards"])
        when = {"before": "before training", "after": "after training"}.get(line["when"], f"at step {line['step']}")
        self.say(
            f"held-out reward {when}: {interval.mean:.3f} (95 % interval {interval.low:.3f} to {interval.high:.3f}; "
            f"{line['num_prompts']} prompts x {line['rollouts_per_prompt']}, {line['seconds']:.0f} s)"
        )
        if errors := line["verifier_errors"]:
            num_rollouts = line["num_prompts"] * line["rollouts_per_prompt"]
            self.say(f"        {errors} of its {num_rollouts} rollouts could not be verified and count as 0")

    def _tell(self, numbers: dict[str, Any], num_left: float) -> None:
        if self._is_logged:
            self.say(self._sentence(numbers, num_left))
        else:
            if not self._headed:
                self._headed = True
                self.say(_HEADER)
            self.say(self._line(numbers, num_left))
        if rejected := numbers["num_rejected"]:
            self.say(_rejected(rejected, numbers["num_rollouts"]))

    def _line(self, numbers: dict[str, Any], num_left: float) -> str:
        baseline = numbers["baseline"]
        correlation = "-" if baseline["pearson"] is None else f"{baseline['pearson']:.2f}"
        return (
            f"{numbers['step']:>6} {numbers['reward']['mean']:>7.3f} {self._recent_reward():>7.3f} "
            f"{baseline['source']:>9} {correlation:>6} {_variance_ratio(numbers):>8.2f} "
            f"{numbers['staleness']['mean']:>5.1f} "
            f"{numbers['tokens_per_s']:>7.0f} {numbers['time_s']['total']:>7.1f} {self._left(num_left):>8}"
        )

    def _sentence(self, numbers: dict[str, Any], num_left: float) -> str:
        num_steps = numbers["step"] + 1 + round(num_left)
        return (
            f"step {numbers['step']} of {num_steps}: reward {numbers['reward']['mean']:.3f}, of the last "
            f"{len(self._rewards)} steps {self._recent_reward():.3f}; baseline {numbers['baseline']['source']}, "
            f"variance {_variance_ratio(numbers):.2f} of that without; staleness {numbers['staleness']['mean']:.1f}; "
            f"{numbers['tokens_per_s']:.0f} tokens/s, {numbers['time_s']['total']:.1f} s; {self._left(num_left)} left"
        )

    def _recent_reward(self) -> float:
        return sum(self._rewards) / len(self._rewards)

    def _left(self, num_steps: float) -> str:
        return clock(sum(self._seconds) / len(self._seconds) * num_steps)


def speaker(console: Console, log: LoggingConfig) -> Callable[[str], None]:
    """Return what says a line to people: on the console, or in the log where that is JSON."""

    def log_line(text: str) -> None:
        if line := text.strip():  # blank lines are for eyes
            logger.info("%s", line)

    def print_line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    return log_line if log.format == "json" else print_line


def _variance_ratio(numbers: dict[str, Any]) -> float:
    variance = numbers["advantage_variance"]
    return (variance["used"] or float("nan")) / variance["none"] if variance["none"] else float("nan")


class MeasurementWatcher(ConsoleWatcher):
    """Shows how far a single measurement is: a live bar, or a line each quarter where there is no terminal."""

    def __init__(self, num_prompts: int, console: Console, log: LoggingConfig) -> None:
        super().__init__(Limits(num_prompts, None, None), 0, console, log)
        self._num_said = 0

    def phase(self, step: int, name: str) -> None:
        """See `Watcher`."""
        self._progress.update(self._task, description=name)

    def sampled(self, step: int, done: int, total: int) -> None:
        """See `Watcher`."""
        self._progress.update(self._task, completed=done)
        num_quarters = 4 * done // total
        if not self._console.is_terminal and num_quarters > self._num_said:
            self._num_said = num_quarters
            self.say(f"{done} of {total} prompts sampled")


def _rejected(num_rejected: Mapping[str, int], num_rollouts: int) -> str:
    """Say how many rollouts of a step the learner did not train on, why, and what to do about it."""
    total, reasons = sum(num_rejected.values()), describe_rejections(num_rejected)
    return f"        {total} of {num_rollouts} rollouts were not trained on: {reasons}"


def clock(seconds: float) -> str:
    """Return a duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
