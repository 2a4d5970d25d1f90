from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from poise.report.curves import (
    load_run,
    moving_mean,
    nan_mean,
    number,
    prediction_pairs,
    running_mean,
    second_half,
    series,
    smoothing_window,
    thinned,
)


def test_a_truncated_last_line_is_skipped_and_counted(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rewa')
    record = load_run(run_dir)
    assert [row["step"] for row in record.metrics] == [0, 1, 2]
    assert record.num_unreadable == 1


def test_lines_after_a_truncated_one_are_read(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(1)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rew\n[1, 2]\n\n{"step": 1}\n')
    record = load_run(run_dir)
    assert [row["step"] for row in record.metrics] == [0, 1]
    assert record.num_unreadable == 2


def test_a_tag_may_be_split_anywhere(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(1)
    (run_dir / "rollouts.jsonl").write_bytes(b'{"response": "na\xc3')
    assert load_run(run_dir).num_unreadable == 1


def test_the_last_line_of_a_repeated_step_counts(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(2)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "reward": {"mean": 0.9}}) + "\n")
    assert series(load_run(run_dir).metrics, "reward", "mean").tolist() == [0.9, 0.1]


def test_an_empty_folder_has_no_data(tmp_path: Path) -> None:
    record = load_run(tmp_path)
    assert (record.metrics, record.values, record.evaluations, record.rollouts) == ([], [], [], [])
    assert record.before is None
    assert record.latest is None


def test_the_last_evaluation_is_that_after_training(
    make_run: Callable[..., Path], new_evaluation: Callable[..., dict[str, object]]
) -> None:
    evaluations = [
        new_evaluation("before", 0, [[0.0], [1.0]]),
        new_evaluation("after", 6, [[1.0], [1.0]]),
        new_evaluation("step", 3, [[0.0], [0.0]]),
    ]
    record = load_run(make_run(evaluations=evaluations))
    assert record.before is not None
    assert record.before.interval.mean == 0.5
    assert record.latest is not None
    assert (record.latest.when, record.latest.step, record.latest.interval.mean) == ("after", 6, 1.0)


def test_the_latest_evaluation_may_be_during_training(
    make_run: Callable[..., Path], new_evaluation: Callable[..., dict[str, object]]
) -> None:
    evaluations = [new_evaluation("step", step, [[step / 10]]) for step in (2, 4)]
    latest = load_run(make_run(evaluations=evaluations)).latest
    assert latest is not None
    assert (latest.when, latest.step) == ("step", 4)


def test_evaluations_without_rewards_are_ignored(make_run: Callable[..., Path]) -> None:
    assert load_run(make_run(evaluations=[{"when": "before", "step": 0, "rewards": [[], [None]]}])).evaluations == []


@pytest.mark.parametrize("row", [{}, {"a": None}, {"a": 1.0}, {"a": {"b": None}}, {"a": {"b": "1"}}])
def test_a_missing_number_is_nan(row: dict[str, object]) -> None:
    assert np.isnan(number(row, "a", "b"))


def test_the_moving_mean_ignores_missing_values() -> None:
    values = np.array([np.nan, 1.0, 3.0, np.nan, 5.0])
    np.testing.assert_allclose(moving_mean(values, 2), [np.nan, 1.0, 2.0, 3.0, 5.0])
    assert moving_mean(np.array([]), 3).size == 0


def test_running_mean_covers_all_values_so_far() -> None:
    np.testing.assert_allclose(running_mean(np.array([1.0, 3.0, np.nan, 8.0])), [1.0, 2.0, 2.0, 4.0])
    assert np.isnan(nan_mean(np.array([np.nan])))


@pytest.mark.parametrize(("num_steps", "window"), [(0, 1), (1, 1), (19, 1), (60, 6), (5000, 25)])
def test_smoothing_is_over_a_tenth_of_the_run(num_steps: int, window: int) -> None:
    assert smoothing_window(num_steps) == window


def test_pairs_with_a_missing_side_are_left_out() -> None:
    rows = [
        {"predicted": [0.1, None, 0.3], "realised": [0.0, 1.0, None]},
        {"predicted": [0.7, 0.8], "realised": [1.0]},
        {"predicted": None},
    ]
    predicted, realised = prediction_pairs(rows)
    assert (predicted.tolist(), realised.tolist()) == ([0.1, 0.7], [0.0, 1.0])


def test_second_half_of_an_odd_number_is_the_larger_half() -> None:
    rows = [{"step": step} for step in range(5)]
    assert [row["step"] for row in second_half(rows)] == [2, 3, 4]


def test_thinning_keeps_the_mean_and_limits_the_points() -> None:
    steps = np.arange(1000.0)
    thin_steps, thin_values = thinned(steps, steps * 2, 100)
    assert thin_steps.size == 100
    np.testing.assert_allclose(thin_values, thin_steps * 2)
    assert thinned(steps[:50], steps[:50], 100)[0].size == 50
