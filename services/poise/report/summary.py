"""The summary of a run, for summary.json and the report."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from poise.algorithms.prediction_quality import (
    bias,
    brier_skill,
    calibration,
    mean_squared_error,
    pearson,
    share_clipped,
)
from poise.report.curves import (
    BASELINES,
    PHASES,
    Doubles,
    Evaluation,
    Row,
    RunRecord,
    load_run,
    nan_mean,
    number,
    prediction_pairs,
    prediction_pairs_by_domain,
    second_half,
    series,
    smoothing_window,
)
from poise.report.statistics import paired_interval
from poise.runtime.files.atomic import without_nan, write_file


def summarise(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a run folder, finished or not. Unknown numbers are None, never NaN.

    Top level: `algorithm`, `num_steps`, `wall_s`, `policy_version`, `num_rollouts`, `num_response_tokens`,
    `tokens_per_s`, `reward`, `held_out`, `advantage_variance`, `weighted_advantage_variance`, `probe`, `biases`,
    `staleness`, `mismatch_logprob`, `time_s`,
    `num_rejected`, `num_verifier_errors`, `num_skipped_rows`, `num_rejected_prompts`, `num_unreadable_lines`.
    """
    return summarise_record(load_run(run_dir))


def summarise_record(record: RunRecord) -> dict[str, Any]:
    """Return the summary of a `RunRecord`."""
    rows = record.metrics
    last: Row = rows[-1] if rows else {}
    window = smoothing_window(len(rows))
    rewards = series(rows, "reward", "mean")
    rejected: Counter[str] = Counter()
    for row in rows:
        rejected.update(row.get("num_rejected") or {})
    tree = {
        "algorithm": last.get("algorithm"),
        "num_steps": len(rows),
        "wall_s": number(last, "wall_s"),
        "policy_version": last.get("policy_version"),
        "num_rollouts": _total(rows, "num_rollouts"),
        "num_response_tokens": _total(rows, "response_tokens", "total"),
        "tokens_per_s": nan_mean(series(rows, "tokens_per_s")),
        "reward": {
            "first": nan_mean(rewards[:window]),
            "last": nan_mean(rewards[-window:]),
            "num_steps_averaged": min(window, len(rows)),
        },
        "held_out": _held_out(record),
        "advantage_variance": _advantage_variance(rows, "advantage_variance"),
        "weighted_advantage_variance": _advantage_variance(rows, "weighted_advantage_variance"),
        "biases": [str(name) for name in last.get("biases") or ()],
        "probe": _probe(record.values, rows),
        "staleness": {
            "mean": nan_mean(series(rows, "staleness", "mean")),
            "max": max((most for row in rows if not math.isnan(most := number(row, "staleness", "max"))), default=None),
        },
        "mismatch_logprob": nan_mean(series(rows, "learner", "mismatch_logprob")),
        "time_s": {phase: float(np.nansum(series(rows, "time_s", phase))) for phase in (*PHASES, "total")},
        "num_rejected": dict(sorted(rejected.items())),
        "num_verifier_errors": _total(rows, "verifier_errors"),
        "num_skipped_rows": record.num_skipped_rows,
        "num_rejected_prompts": _total(rows, "num_rejected_prompts"),
        "num_unreadable_lines": record.num_unreadable,
    }
    plain: dict[str, Any] = without_nan(tree)
    return plain


def write_summary(run_dir: Path) -> Path:
    """Write summary.json into the run folder, atomically, and return its path."""
    path = run_dir / "summary.json"
    write_file(path, (json.dumps(summarise(run_dir), indent=2, allow_nan=False) + "\n").encode())
    return path


def _held_out(record: RunRecord) -> dict[str, Any] | None:
    """Return both evaluations, their paired difference and the verdict.

    "rose_beyond_intervals": the second interval is above the first. "rose": they overlap, but the interval of the
    paired difference is above zero. "fell": the second interval is below the first, or that of the difference
    below zero. "unclear": the paired difference may be zero, or is unknown.
    """
    before, latest = record.before, record.latest
    if before is None and latest is None:
        return None
    tree: dict[str, Any] = {
        "before": _evaluation_tree(before),
        "after": _evaluation_tree(latest),
        "difference": None,
        "verdict": None,
    }
    if before and latest:
        difference = None
        if len(before.rewards) == len(latest.rewards):
            difference = paired_interval(before.rewards, latest.rewards)
            tree["difference"] = asdict(difference)
        if latest.interval.low > before.interval.high:
            tree["verdict"] = "rose_beyond_intervals"
        elif difference and difference.low > 0:
            tree["verdict"] = "rose"
        elif latest.interval.high < before.interval.low or (difference and difference.high < 0):
            tree["verdict"] = "fell"
        else:
            tree["verdict"] = "unclear"
    return tree


def _evaluation_tree(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        "when": evaluation.when,
        "step": evaluation.step,
        "num_prompts": len(evaluation.rewards),
        "num_rollouts": sum(map(len, evaluation.rewards)),
        **asdict(evaluation.interval),
        "by_domain": evaluation.by_domain,
        "scores": evaluation.scores,
    }


def _advantage_variance(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """Return means over all steps, and over the steps whose baselines all came from the value service."""
    probe_steps = [row for row in rows if number(row, "baseline", "probe_share") == 1]
    return {"all_steps": _variances(rows, kind), "probe_steps": _variances(probe_steps, kind)}


def _variances(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    means = {name: nan_mean(series(rows, kind, name)) for name in BASELINES}
    ratios = {name: means["used"] / means[name] if means[name] > 0 else math.nan for name in BASELINES[1:]}
    return {"num_steps": len(rows), **means, "used_relative_to": ratios}


def _probe(rows: Sequence[Row], metrics: Sequence[Row]) -> dict[str, Any] | None:
    """Return the quality of values over the second half of the steps with values; None if no step has any."""
    later = second_half(rows)
    predicted, realised = prediction_pairs(later)
    if not predicted.size:
        return None
    by_domain = prediction_pairs_by_domain(later)
    same_steps = [row for row in metrics if row["step"] >= later[0]["step"]]
    return {
        "from_step": later[0]["step"],
        **_quality(predicted, realised),
        "brier_of_constant": float(np.var(realised)),
        "by_domain": {
            domain: {
                **_quality(*pairs),
                "calibration": [asdict(one) for one in calibration(*pairs)],
                "estimator": _last_estimator(domain, metrics),
                "used_relative_to": _variance_ratios(domain, same_steps, "advantage_variance"),
                "weighted_relative_to": _variance_ratios(domain, same_steps, "weighted_advantage_variance"),
            }
            for domain, pairs in by_domain.items()
        },
    }


def _last_estimator(domain: str, rows: Sequence[Row]) -> str | None:
    """Return the estimator that answered last in a domain; None if no step recorded it."""
    for row in reversed(rows):
        baseline = row.get("baseline")
        estimators = baseline.get("estimator") if isinstance(baseline, dict) else None
        if isinstance(estimators, dict) and domain in estimators:
            return str(estimators[domain])
    return None


def _variance_ratios(domain: str, rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Return a domain's advantage variance relative to other baselines, over the steps with a probe."""
    means = {name: nan_mean(series(rows, kind, "by_domain", domain, name)) for name in BASELINES}
    return {name: means["used"] / means[name] if means[name] > 0 else math.nan for name in BASELINES[1:]}


def _quality(predicted: Doubles, realised: Doubles) -> dict[str, Any]:
    return {
        "num_pairs": int(predicted.size),
        "pearson": pearson(predicted, realised),
        "brier": mean_squared_error(predicted, realised),
        "brier_skill": brier_skill(predicted, realised),
        "bias": bias(predicted, realised),
        "share_clipped": share_clipped(predicted),
    }


def _total(rows: Sequence[Row], *path: str) -> int:
    return int(np.nansum(series(rows, *path)))
