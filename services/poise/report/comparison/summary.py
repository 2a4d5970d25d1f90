"""The summary of a comparison, for comparison.json, its tables and its figures. Unknown numbers are None, never NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poise.report.comparison.arithmetic import (
    Curve,
    MeanCurve,
    common_levels,
    crossing,
    describe_spread,
    make_curve,
    mean_curve,
    ratio,
    spread,
)
from poise.report.curves import PHASES, Row, RunRecord, load_run, nan_mean, number, series

State = Literal["finished", "unfinished", "failed", "not begun"]

AXES = {"tokens": "tokens", "seconds": "wall_s"}
"""Horizontal axes of the curves, and the key of each in an evaluation."""


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    """Name of its settings, the same for all seeds."""
    seed: int
    algorithm: str
    folder: Path
    state: State


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs to compare."""

    name: str
    budget: Mapping[str, float]
    """Budget of each run, in `tokens`, `wall_s` or `updates`."""
    reference: str
    """Name of the run that is the denominator of ratios."""
    levels: Sequence[float]
    """Reward levels; empty chooses them from the curves."""
    runs: Sequence[ComparedRun]


@dataclass(frozen=True, slots=True)
class _Seed:
    """A run with the content of its folder."""

    run: ComparedRun
    record: RunRecord
    curves: dict[str, Curve]
    """By axis."""


def summarise_comparison(comparison: Comparison) -> dict[str, Any]:
    """Return the summary. Its `runs` are keyed by name, and the `seeds` of each run by seed."""
    by_name: dict[str, list[_Seed]] = {}
    for run in comparison.runs:
        by_name.setdefault(run.name, []).append(_read(run))
    means = {
        name: {axis: mean_curve([seed.curves[axis] for seed in seeds]) for axis in AXES}
        for name, seeds in by_name.items()
    }
    on_tokens = [mean.curve for name in by_name if (mean := means[name]["tokens"])]
    levels = list(comparison.levels) or common_levels(on_tokens)
    runs = {name: _run_tree(seeds, means[name], levels) for name, seeds in by_name.items()}
    for tree in runs.values():
        _add_ratios(tree, runs[comparison.reference])
    return {
        "name": comparison.name,
        "budget": dict(comparison.budget),
        "reference": comparison.reference,
        "is_complete": all(run.state == "finished" for run in comparison.runs),
        "levels": levels,
        "levels_from": "settings" if comparison.levels else "curves",
        "runs": runs,
    }


def _read(run: ComparedRun) -> _Seed:
    record = load_run(run.folder)
    curves = {
        axis: make_curve((getattr(one, key), one.interval.mean) for one in record.evaluations)
        for axis, key in AXES.items()
    }
    return _Seed(run, record, curves)


def _run_tree(seeds: Sequence[_Seed], means: Mapping[str, MeanCurve | None], levels: Sequence[float]) -> dict[str, Any]:
    measured = [seed for seed in seeds if seed.record.metrics]
    return {
        "algorithm": seeds[0].run.algorithm,
        "spread": describe_spread(sum(bool(seed.record.evaluations) for seed in seeds)),
        "seeds": {str(seed.run.seed): _seed_tree(seed, levels) for seed in seeds},
        "curves": {axis: _curve_tree(mean) for axis, mean in means.items()},
        "final": _final(seeds),
        "to_reach": {axis: [_reach(mean, level) for level in levels] for axis, mean in means.items()},
        "num_steps": _spread_over(measured, lambda record: float(len(record.metrics))),
        "tokens": _spread_over(measured, lambda record: number(record.metrics[-1], "tokens")),
        "wall_s": _spread_over(measured, lambda record: number(record.metrics[-1], "wall_s")),
        "mean_squared_advantage": _spread_over(measured, lambda record: _mean(record, "advantage_variance", "used")),
        "weighted_squared_advantage": _spread_over(
            measured, lambda record: _mean(record, "weighted_advantage_variance", "used")
        ),
        "gradient_variance": _spread_over(measured, _gradient_variance),
        "gradient_variance_at_equal_tokens": _spread_over(measured, _variance_at_equal_tokens),
        "zero_advantage_share": _spread_over(measured, lambda record: _mean(record, "zero_advantage_share")),
        "final_pass_at_k": _final_pass_at_k(seeds),
        "final_token_entropy": _spread_over(measured, _final_entropy),
        "time_s": {phase: _spread_over(measured, partial(_total_s, phase)) for phase in (*PHASES, "total")},
    }


def _seed_tree(seed: _Seed, levels: Sequence[float]) -> dict[str, Any]:
    rows = seed.record.metrics
    return {
        "state": seed.run.state,
        "folder": str(seed.run.folder),
        "num_steps": len(rows),
        "evaluations": [
            {
                "step": one.step,
                "tokens": _if_finite(one.tokens),
                "wall_s": _if_finite(one.wall_s),
                **asdict(one.interval),
            }
            for one in seed.record.evaluations
        ],
        "to_reach": {axis: [crossing(curve, level) for level in levels] for axis, curve in seed.curves.items()},
    }


def _curve_tree(mean: MeanCurve | None) -> dict[str, Any] | None:
    if mean is None:
        return None
    return {
        "x": mean.curve.x.tolist(),
        "mean": mean.curve.y.tolist(),
        "low": mean.low.tolist(),
        "high": mean.high.tolist(),
    }


def _reach(mean: MeanCurve | None, level: float) -> dict[str, Any]:
    return {"level": level, "on_mean_curve": None if mean is None else crossing(mean.curve, level)}


def _final(seeds: Sequence[_Seed]) -> dict[str, Any] | None:
    """Return the last held-out reward: the mean over seeds, or for one seed its interval over prompts."""
    last = [seed.record.evaluations[-1].interval for seed in seeds if seed.record.evaluations]
    if not last:
        return None
    if len(last) == 1:
        return asdict(last[0]) | {"interval": "95 % over held-out prompts, one seed"}
    return asdict(spread([one.mean for one in last])) | {"interval": describe_spread(len(last))}


def _final_pass_at_k(seeds: Sequence[_Seed]) -> dict[str, Any]:
    """Return mean and spread of each pass@k of the last evaluation, by name: pass@1, pass@2, …"""
    overall = [
        scores["overall"]
        for seed in seeds
        if seed.record.evaluations and (scores := seed.record.evaluations[-1].scores) is not None
    ]
    names = [name for name in (overall[0] if overall else ()) if name.startswith("pass@")]
    return {
        name: asdict(spread([scores[name]["mean"] for scores in overall])) | {"num_seeds": len(overall)}
        for name in names
        if all(name in scores for scores in overall)
    }


def _final_entropy(record: RunRecord) -> float:
    """Return the mean entropy of trained tokens over the last tenth of the steps, in nats."""
    return _mean_of_rows(record.metrics[-max(1, len(record.metrics) // 10) :], "learner", "entropy")


def _add_ratios(tree: dict[str, Any], reference: Mapping[str, Any]) -> None:
    """Add ratios to the reference run, on the mean curves and for each seed."""
    for axis, reaches in tree["to_reach"].items():
        for index, reach in enumerate(reaches):
            denominator = reference["to_reach"][axis][index]["on_mean_curve"]
            reach["ratio"] = ratio(reach["on_mean_curve"], denominator)
            reach["by_seed"] = {seed: one["to_reach"][axis][index] for seed, one in tree["seeds"].items()}
            reach["ratio_by_seed"] = {
                seed: ratio(value, reference["seeds"][seed]["to_reach"][axis][index])
                for seed, value in reach["by_seed"].items()
                if seed in reference["seeds"]
            }
    for name in (
        "mean_squared_advantage",
        "weighted_squared_advantage",
        "gradient_variance",
        "gradient_variance_at_equal_tokens",
    ):
        own, other = tree[name], reference[name]
        if own is not None:
            own["ratio"] = ratio(own["mean"], other and other["mean"])


def _spread_over(seeds: Sequence[_Seed], measure: Callable[[RunRecord], float]) -> dict[str, Any] | None:
    """Return the mean and spread of a number over the seeds that have it; None if no seed has it."""
    values = [value for seed in seeds if math.isfinite(value := measure(seed.record))]
    return asdict(spread(values)) | {"num_seeds": len(values)} if values else None


def _mean(record: RunRecord, *path: str) -> float:
    return _mean_of_rows(record.metrics, *path)


def _mean_of_rows(rows: Sequence[Row], *path: str) -> float:
    return nan_mean(series(rows, *path))


def _gradient_variance(record: RunRecord) -> float:
    """Return the mean over steps; NaN if the learner reports 0, which means that it was not measured."""
    return _mean(record, "learner", "gradient_variance") or math.nan


def _variance_at_equal_tokens(record: RunRecord) -> float:
    """Return variance * tokens per step. Twice as many tokens per step halve the variance."""
    return _gradient_variance(record) * number(record.metrics[-1], "tokens") / len(record.metrics)


def _total_s(phase: str, record: RunRecord) -> float:
    return float(np.nansum(series(record.metrics, "time_s", phase)))


def _if_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
