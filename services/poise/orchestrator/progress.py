"""Progress of a run on the terminal: one line for each step and a live bar; or log lines if the log is JSON."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from poise.orchestrator.budget import Limits, Usage
from poise.orchestrator.run_checks import describe_rejections
from poise.runtime.config.settings import LoggingConfig
from poise.runtime.logging import log_ids

logger = logging.getLogger(__name__)

_RECENT_STEPS = 10
_HEADER = "  step  reward  mean10  baseline      r var/none stale   tok/s  s/step     left"
"""mean10: mean reward of ten steps. r: Pearson correlation of values and rewards. var/none: squared advantage relative
to no baseline, weighted by squared score norms if the engine returns token statistics."""


class ConsoleProgress:
    """Shows the progress of a run. Implements `Callbacks`. Use as a context manager."""

    def __init__(self, limits: Limits, first_step: int, console: Console, log: LoggingConfig) -> None:
        self._limits = limits
        self._console = console
        self._print = line_printer(console, log)
        self._is_logged = log.format == "json"
        self._rewards: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._has_header = False
        self._phases: dict[int, str] = {}
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=self._is_logged or not console.is_terminal,
        )
        self._task: TaskID = self.bar.add_task("starting", total=limits.num_steps, completed=first_step)

    def __enter__(self) -> ConsoleProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text)

    def on_phase(self, step: int, name: str) -> None:
        """See `Callbacks`."""
        self._phases[step] = name
        shown = ", ".join(f"step {at}: {phase}" for at, phase in sorted(self._phases.items()))
        self.bar.update(self._task, description=shown)

    def on_sampled(self, step: int, done: int, total: int) -> None:
        """See `Callbacks`."""
        self.on_phase(step, f"generate {done}/{total}")

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        """See `Callbacks`."""
        self._rewards.append(metrics["reward"]["mean"])
        self._seconds.append(metrics["time_s"]["total"])
        self._phases.pop(metrics["step"], None)
        num_done = metrics["step"] + 1
        num_left = self._limits.num_steps_left(Usage(num_done, metrics["tokens"], metrics["wall_s"]))
        self.bar.update(self._task, completed=num_done, total=num_done + round(num_left))
        with log_ids(step=metrics["step"]):
            self._print_step(metrics, num_left)

    def on_evaluation_end(self, line: dict[str, Any]) -> None:
        """See `Callbacks`."""
        from poise.report.statistics import bootstrap_interval

        interval = bootstrap_interval(line["rewards"])
        when = {"before": "before training", "after": "after training"}.get(line["when"], f"at step {line['step']}")
        self.print(
            f"held-out reward {when}: {interval.mean:.3f} (95 % interval {interval.low:.3f} to {interval.high:.3f}; "
            f"{line['num_prompts']} prompts x {line['rollouts_per_prompt']} rollouts, {line['seconds']:.0f} s)"
        )
        if errors := line["verifier_errors"]:
            num_rollouts = line["num_prompts"] * line["rollouts_per_prompt"]
            self.print(f"        the verifier failed on {errors} of {num_rollouts} rollouts; their reward is 0")

    def _print_step(self, metrics: dict[str, Any], num_left: float) -> None:
        if self._is_logged:
            self.print(self._sentence(metrics, num_left))
        else:
            if not self._has_header:
                self._has_header = True
                self.print(_HEADER)
            self.print(self._row(metrics, num_left))
        if rejected := metrics["num_rejected"]:
            self.print(
                f"        the learner rejected {sum(rejected.values())} of {metrics['num_rollouts']} rollouts: "
                f"{describe_rejections(rejected)}"
            )

    def _row(self, metrics: dict[str, Any], num_left: float) -> str:
        baseline = metrics["baseline"]
        correlation = "-" if baseline["pearson"] is None else f"{baseline['pearson']:.2f}"
        return (
            f"{metrics['step']:>6} {metrics['reward']['mean']:>7.3f} {self._recent_reward():>7.3f} "
            f"{baseline['source']:>9} {correlation:>6} {_variance_ratio(metrics):>8.2f} "
            f"{metrics['staleness']['mean']:>5.1f} "
            f"{metrics['tokens_per_s']:>7.0f} {metrics['time_s']['total']:>7.1f} {self._time_left(num_left):>8}"
        )

    def _sentence(self, metrics: dict[str, Any], num_left: float) -> str:
        num_steps = metrics["step"] + 1 + round(num_left)
        return (
            f"step {metrics['step']} of {num_steps}: reward {metrics['reward']['mean']:.3f}, mean of the last "
            f"{len(self._rewards)} steps {self._recent_reward():.3f}; baseline {metrics['baseline']['source']}, "
            f"variance {_variance_ratio(metrics):.2f} of no baseline; staleness {metrics['staleness']['mean']:.1f}; "
            f"{metrics['tokens_per_s']:.0f} tokens/s, {metrics['time_s']['total']:.1f} s; {self._time_left(num_left)} "
            "left"
        )

    def _recent_reward(self) -> float:
        return sum(self._rewards) / len(self._rewards)

    def _time_left(self, num_steps: float) -> str:
        return format_duration(sum(self._seconds) / len(self._seconds) * num_steps)


class EvaluationProgress(ConsoleProgress):
    """Shows the progress of `poise eval`: a live bar, or without a terminal a line for each quarter."""

    def __init__(self, num_prompts: int, console: Console, log: LoggingConfig) -> None:
        super().__init__(Limits(num_prompts), 0, console, log)
        self._num_quarters = 0

    def on_phase(self, step: int, name: str) -> None:
        """See `Callbacks`."""
        self.bar.update(self._task, description=name)

    def on_sampled(self, step: int, done: int, total: int) -> None:
        """See `Callbacks`."""
        self.bar.update(self._task, completed=done)
        num_quarters = 4 * done // total
        if not self._console.is_terminal and num_quarters > self._num_quarters:
            self._num_quarters = num_quarters
            self.print(f"{done} of {total} prompts sampled")


def line_printer(console: Console, log: LoggingConfig) -> Callable[[str], None]:
    """Return a function that prints a line for people: on the console, or in the log if that is JSON."""

    def log_line(text: str) -> None:
        if line := text.strip():
            logger.info("%s", line)

    def print_line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    return log_line if log.format == "json" else print_line


def _variance_ratio(metrics: dict[str, Any]) -> float:
    variance = metrics.get("weighted_advantage_variance") or {"none": None}  # older journals have none
    if variance["none"] is None:
        variance = metrics["advantage_variance"]
    is_known = variance["used"] is not None and variance["none"]
    return float(variance["used"] / variance["none"]) if is_known else float("nan")


def format_duration(seconds: float) -> str:
    """Return a duration such as `4m05s` or `1h02m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
