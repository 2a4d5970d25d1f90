"""Reads a run folder, and returns its metrics as series.

Damaged files are tolerated, because reports of failed runs matter most. Invalid JSON lines are skipped and counted. If
a step was written twice, the last line counts. Missing and null numbers become NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.report.scores import read_table
from poise.report.statistics import Interval, bootstrap_interval

Row = dict[str, Any]
Doubles = NDArray[np.float64]

BASELINES = ("used", "none", "rloo", "batch_mean")
"""Baselines whose advantage variance is recorded for each step, on the same rewards."""
PHASES = ("generate", "verify", "baselines", "journal", "publish", "train", "weights")
"""Phases of a step, in order."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out rewards of one evaluation."""

    when: str
    """`before`, `step` or `after`."""
    step: int
    rewards: tuple[tuple[float, ...], ...]
    """Rewards of each prompt."""
    by_domain: dict[str, float]
    interval: Interval
    scores: Row | None
    """See `score_table`; None if the line has none."""
    tokens: float
    """Response tokens sampled for training so far; NaN if unknown."""
    wall_s: float
    """Seconds of training so far; NaN if unknown."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of a run folder, in the order of steps."""

    metrics: list[Row]
    values: list[Row]
    evaluations: list[Evaluation]
    rollouts: list[Row]
    num_unreadable: int
    """Number of lines skipped, in all files."""
    num_skipped_rows: int = 0
    """Number of invalid rows of data files that the run skips."""

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before training."""
        return next((e for e in reversed(self.evaluations) if e.when == "before"), None)

    @property
    def latest(self) -> Evaluation | None:
        """The evaluation after training or, before it exists, the last one during training."""
        for when in ("after", "step"):
            found = next((e for e in reversed(self.evaluations) if e.when == when), None)
            if found:
                return found
        return None


def load_run(run_dir: Path) -> RunRecord:
    """Read a run folder. Missing files count as empty."""
    metrics, bad_metrics = _read_rows(run_dir / "metrics.jsonl")
    values, bad_values = _read_rows(run_dir / "values.jsonl")
    evaluations, bad_evaluations = _read_rows(run_dir / "evaluations.jsonl")
    rollouts, bad_rollouts = _read_rows(run_dir / "rollouts.jsonl")
    return RunRecord(
        metrics=_latest_by_step(metrics),
        values=_latest_by_step(values),
        evaluations=[evaluation for row in evaluations if (evaluation := _evaluation(row))],
        rollouts=rollouts,
        num_unreadable=bad_metrics + bad_values + bad_evaluations + bad_rollouts,
        num_skipped_rows=_skipped_rows(run_dir / "data.json"),
    )


def _skipped_rows(path: Path) -> int:
    try:
        return sum(int(file["num_bad"]) for file in json.loads(path.read_bytes()).values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0


def number(row: Row, *path: str) -> float:
    """Return the number at a path of keys; NaN if there is none."""
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def series(rows: Iterable[Row], *path: str) -> Doubles:
    """Return the number at a path of keys in every row; NaN if there is none."""
    return np.array([number(row, *path) for row in rows], np.float64)


def smoothing_window(num_steps: int) -> int:
    """Return the smoothing window in steps: a tenth of the run, from 1 to 25."""
    return max(1, min(25, num_steps // 10))


def moving_mean(values: Doubles, window: int) -> Doubles:
    """Return the mean of the last `window` values at every step, ignoring NaN; NaN if all are NaN."""
    present = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(present, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(present)])
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(ends - window, 0)
    num = counts[ends] - counts[starts]
    return np.where(num > 0, (sums[ends] - sums[starts]) / np.maximum(num, 1), np.nan)


def running_mean(values: Doubles) -> Doubles:
    """Return the mean of all values so far at every step."""
    return moving_mean(values, max(1, values.size))


def nan_mean(values: Doubles) -> float:
    """Return the mean, ignoring NaN; NaN if there is no value."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def prediction_pairs(rows: Iterable[Row]) -> tuple[Doubles, Doubles]:
    """Return predicted and realised values of all rows, for rollouts with both."""
    pairs = [
        (float(predicted), float(realised))
        for row in rows
        for predicted, realised in zip(row.get("predicted") or (), row.get("realised") or (), strict=False)
        if isinstance(predicted, (int, float)) and isinstance(realised, (int, float))
    ]
    array = np.array(pairs, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    return array[:, 0], array[:, 1]


def prediction_pairs_by_domain(rows: Iterable[Row]) -> dict[str, tuple[Doubles, Doubles]]:
    """Return `prediction_pairs` of each domain, sorted by name."""
    by_domain: dict[str, list[Row]] = {}
    for row in rows:
        pairs = zip(row.get("predicted") or (), row.get("realised") or (), row.get("domain") or (), strict=False)
        for predicted, realised, domain in pairs:
            by_domain.setdefault(str(domain), []).append({"predicted": [predicted], "realised": [realised]})
    return {domain: prediction_pairs(by_domain[domain]) for domain in sorted(by_domain)}


def second_half(rows: Sequence[Row]) -> list[Row]:
    """Return the second half of the rows, with the middle one. By then the probe has had data to learn from."""
    return list(rows[len(rows) // 2 :])


def thinned(steps: Doubles, values: Doubles, max_points: int) -> tuple[Doubles, Doubles]:
    """Return the means of at most `max_points` blocks of consecutive steps, to limit the size of a figure."""
    if steps.size <= max_points:
        return steps, values
    blocks = np.array_split(np.arange(steps.size), max_points)
    return np.array([steps[b].mean() for b in blocks]), np.array([nan_mean(values[b]) for b in blocks])


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """Return the objects of a JSON Lines file, and the number of lines that are not objects."""
    if not path.exists():
        return [], 0
    rows: list[Row] = []
    num_bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                num_bad += 1
    return rows, num_bad


def _latest_by_step(rows: Iterable[Row]) -> list[Row]:
    by_step = {int(row["step"]): row for row in rows if isinstance(row.get("step"), int)}
    return [by_step[step] for step in sorted(by_step)]


def _evaluation(row: Row) -> Evaluation | None:
    """Return an evaluation; None if it has no rewards."""
    rewards = tuple(
        tuple(float(reward) for reward in prompt if isinstance(reward, (int, float)))
        for prompt in row.get("rewards") or ()
    )
    if not any(rewards):
        return None
    found = row.get("by_domain")
    by_domain: Row = found if isinstance(found, dict) else {}
    step = number(row, "step")
    return Evaluation(
        when=str(row.get("when")),
        step=0 if math.isnan(step) else int(step),
        rewards=rewards,
        by_domain={str(name): mean for name in by_domain if not math.isnan(mean := number(by_domain, name))},
        interval=bootstrap_interval(rewards),
        scores=read_table(row.get("scores")),
        tokens=number(row, "tokens"),
        wall_s=number(row, "wall_s"),
    )
