"""Progress lines and the live bar."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from poise.orchestrator.budget import Limits
from poise.orchestrator.progress import ConsoleProgress, EvaluationProgress, format_duration
from poise.runtime.config.settings import LoggingConfig


def numbers(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 30 * (step + 1),
        "wall_s": 2.0 * (step + 1),
        "reward": {"mean": 0.5},
        "time_s": {"total": 2.0},
        "baseline": {"pearson": None, "source": "bootstrap"},
        "advantage_variance": {"used": 0.1, "none": 0.2},
        "staleness": {"mean": 1.25, "max": 2},
        "tokens_per_s": 100.0,
        "num_rollouts": 8,
        "num_rejected": {},
    }


def test_the_bar_shows_all_unfinished_steps() -> None:
    written = io.StringIO()
    progress = ConsoleProgress(Limits(10), 0, Console(file=written, width=200), LoggingConfig())

    def shown() -> str:
        return str(progress.bar.tasks[0].description)

    progress.on_phase(3, "train")
    progress.on_phase(4, "generate")
    assert shown() == "step 3: train, step 4: generate"
    progress.on_sampled(4, 7, 64)
    assert shown() == "step 3: train, step 4: generate 7/64"
    progress.on_phase(4, "verify")
    assert shown() == "step 3: train, step 4: verify"
    progress.on_step_end(numbers(3))
    progress.on_phase(4, "train")
    assert shown() == "step 4: train"
    header, line = written.getvalue().splitlines()
    assert line.split()[header.split().index("stale")] == "1.2"
    assert line.split()[-1] == "0m12s"  # six steps of two seconds
    assert line.split()[header.split().index("var/none")] == "0.50"


@pytest.mark.parametrize(("none", "shown"), [(0.4, "0.25"), (None, "0.50")])
def test_weighted_variances_are_preferred(none: float | None, shown: str) -> None:
    written = io.StringIO()
    progress = ConsoleProgress(Limits(10), 0, Console(file=written, width=200), LoggingConfig())
    progress.on_step_end(numbers(0) | {"weighted_advantage_variance": {"used": 0.1, "none": none}})
    header, line = written.getvalue().splitlines()
    assert line.split()[header.split().index("var/none")] == shown


def test_evaluations_without_a_terminal_print_quarters() -> None:
    written = io.StringIO()
    progress = EvaluationProgress(6, Console(file=written, width=200), LoggingConfig())
    for done in range(1, 7):
        progress.on_sampled(0, done, 6)
    assert written.getvalue().splitlines() == [f"{done} of 6 prompts sampled" for done in (2, 3, 5, 6)]
    progress.on_phase(0, "verify")
    (task,) = progress.bar.tasks
    assert (task.completed, task.total, task.description) == (6, 6, "verify")


def test_rejected_rollouts_are_printed_with_a_remedy() -> None:
    written = io.StringIO()
    progress = ConsoleProgress(Limits(10), 0, Console(file=written, width=200), LoggingConfig())
    progress.on_step_end(numbers(3) | {"num_rejected": {"stale": 3, "duplicate": 1, "new_reason": 1}})
    progress.on_step_end(numbers(4))
    _, step, rejected, next_step = written.getvalue().splitlines()
    assert (step.split()[0], next_step.split()[0]) == ("3", "4")
    assert rejected.strip() == (
        "the learner rejected 5 of 8 rollouts: "
        "3 older than max_staleness allows; raise it for the learner, or lower it for the run; "
        "1 trained on before; give the run a new name; 1 new_reason"
    )


def test_json_logs_get_a_sentence_for_each_step(caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    progress = ConsoleProgress(Limits(10), 0, Console(file=written), LoggingConfig(format="json"))
    with caplog.at_level("INFO", logger="poise.orchestrator.progress"), progress:
        progress.print("")
        progress.print("resuming")
        progress.on_step_end(numbers(3))
    assert written.getvalue() == ""
    assert caplog.messages == [
        "resuming",
        "step 3 of 10: reward 0.500, mean of the last 1 steps 0.500; baseline bootstrap, variance 0.50 of no baseline; "
        "staleness 1.2; 100 tokens/s, 2.0 s; 0m12s left",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(59.6, "1m00s"), (0, "0m00s"), (3661, "1h01m")])
def test_durations_are_formatted(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said
