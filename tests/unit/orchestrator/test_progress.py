"""What the live line says while several steps are in hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from poise.orchestrator.budget import Limits
from poise.orchestrator.progress import ConsoleWatcher, MeasurementWatcher, clock
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


def test_all_steps_in_hand_are_shown_until_they_are_done() -> None:
    written = io.StringIO()
    watcher = ConsoleWatcher(Limits(10), 0, Console(file=written, width=200), LoggingConfig())

    def shown() -> str:
        return str(watcher._progress.tasks[0].description)

    watcher.phase(3, "train")
    watcher.phase(4, "generate")
    assert shown() == "step 3: train, step 4: generate"
    watcher.sampled(4, 7, 64)
    assert shown() == "step 3: train, step 4: generate 7/64"
    watcher.phase(4, "verify")
    assert shown() == "step 3: train, step 4: verify"
    watcher.step_done(numbers(3))
    watcher.phase(4, "train")
    assert shown() == "step 4: train"
    header, line = written.getvalue().splitlines()
    assert line.split()[header.split().index("stale")] == "1.2"
    assert line.split()[-1] == "0m12s"  # six steps of two seconds


def test_a_measurement_is_told_by_quarters_where_there_is_no_terminal() -> None:
    written = io.StringIO()
    watcher = MeasurementWatcher(6, Console(file=written, width=200), LoggingConfig())
    for done in range(1, 7):
        watcher.sampled(0, done, 6)
    assert written.getvalue().splitlines() == [f"{done} of 6 prompts sampled" for done in (2, 3, 5, 6)]
    watcher.phase(0, "verify")
    (task,) = watcher._progress.tasks
    assert (task.completed, task.total, task.description) == (6, 6, "verify")


def test_rollouts_that_the_learner_rejected_are_told_with_what_to_do() -> None:
    written = io.StringIO()
    watcher = ConsoleWatcher(Limits(10), 0, Console(file=written, width=200), LoggingConfig())
    watcher.step_done(numbers(3) | {"num_rejected": {"stale": 3, "duplicate": 1, "new_reason": 1}})
    watcher.step_done(numbers(4))
    _, step, rejected, next_step = written.getvalue().splitlines()
    assert (step.split()[0], next_step.split()[0]) == ("3", "4")
    assert rejected.strip() == (
        "5 of 8 rollouts were not trained on: "
        "3 from older weights than max_staleness allows: raise it for the learner, or lower it for the run; "
        "1 trained on before: give the run a name of its own; 1 new_reason"
    )


def test_for_collectors_steps_are_lines_of_the_log_and_no_table(caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    watcher = ConsoleWatcher(Limits(10), 0, Console(file=written), LoggingConfig(format="json"))
    with caplog.at_level("INFO", logger="poise.orchestrator.progress"), watcher:
        watcher.say("")
        watcher.say("resuming")
        watcher.step_done(numbers(3))
    assert written.getvalue() == ""
    assert caplog.messages == [
        "resuming",
        "step 3 of 10: reward 0.500, of the last 1 steps 0.500; baseline bootstrap, variance 0.50 of that without; "
        "staleness 1.2; 100 tokens/s, 2.0 s; 0m12s left",
    ]


@pytest.mark.parametrize(("seconds", "said"), [(59.6, "1m00s"), (0, "0m00s"), (3661, "1h01m")])
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert clock(seconds) == said
