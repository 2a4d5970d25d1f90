"""The metrics of a step: its line of metrics.jsonl.

Shapes: n rollouts of one prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.algorithms.prediction_quality import bias, brier_skill, mean_squared_error, pearson
from poise.orchestrator.sampling.scored_groups import ScoredGroup, StepBaselines, rewards_of
from poise.runtime.files.atomic import without_nan
from poise_client.types import Floats, StepResult

_ROUNDING = 1e-6
"""Advantages up to this size count as zero."""


def sampling_metrics(
    sampled: Sequence[ScoredGroup], kept: Sequence[ScoredGroup], baselines: StepBaselines, policy_version: int
) -> dict[str, Any]:
    """Return the metrics of a step's rollouts. They were requested at `policy_version`.

    Rewards, tokens and staleness cover all `sampled` groups; baselines and advantages cover the `kept` groups.
    """
    rollouts = [rollout for item in sampled for rollout in item.group.rollouts]
    lengths = [rollout.token_ids.size for rollout in rollouts]
    ages = [policy_version - min(span.policy_version for span in rollout.version_spans) for rollout in rollouts]
    pairs = predictions(kept, baselines)
    metrics: dict[str, Any] = {
        "reward": {"mean": float(np.concatenate(rewards_of(sampled)).mean()), "by_domain": _mean_by_domain(sampled)},
        "baseline": {
            "source": baselines.source,
            "probe_share": len(pairs["predicted"]) / sum(item.rewards.size for item in kept),
            "probe_version": dict(baselines.probe_versions),
            "probe_up_to_date": baselines.up_to_date,
            **_quality(pairs["predicted"], pairs["realised"]),
            "by_domain": {domain: _quality(*_of_domain(pairs, domain)) for domain in sorted(set(pairs["domain"]))},
        },
        "advantage_variance": _advantage_variance(kept, baselines)
        | {"by_domain": _advantage_variance_by_domain(kept, baselines)},
        "zero_advantage_share": _zero_advantage_share(kept, baselines),
        "response_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths), "total": sum(lengths)},
        "staleness": {"mean": float(np.mean(ages)), "max": max(ages)},
        "num_groups": len(sampled),
        "num_kept_groups": len(kept),
        "num_rollouts": len(rollouts),
    }
    return metrics


def learner_metrics(result: StepResult) -> dict[str, Any]:
    """Return the metrics of a step's training."""
    learner = {name: getattr(result.metrics, name) for name in type(result.metrics).__dataclass_fields__}
    learner["staleness"] = {str(age): count for age, count in result.metrics.staleness.items()}
    metrics = {
        "policy_version": result.policy_version,
        "num_rejected": dict(Counter(reason for _, reason in result.rejected)),
        "learner": without_nan(learner),
    }
    if ages := result.metrics.staleness:  # at training time: the policy may have advanced since sampling
        mean = sum(age * count for age, count in ages.items()) / sum(ages.values())
        metrics["staleness"] = {"mean": mean, "max": max(ages)}
    return metrics


def predictions(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> dict[str, list[Any]]:
    """Return the probe's value, the siblings' mean reward and the domain of every rollout with a probe value."""
    pairs: dict[str, list[Any]] = {"predicted": [], "realised": [], "domain": []}
    for index, item in enumerate(kept):
        values_n = baselines.value(index)
        if values_n is not None:
            pairs["predicted"] += values_n.tolist()
            pairs["realised"] += mean_of_others(item.rewards).tolist()
            pairs["domain"] += [item.domain] * len(values_n)
    return pairs


def _of_domain(pairs: dict[str, list[Any]], domain: str) -> tuple[list[float], list[float]]:
    inside = [index for index, name in enumerate(pairs["domain"]) if name == domain]
    return [pairs["predicted"][index] for index in inside], [pairs["realised"][index] for index in inside]


def _quality(predicted: Sequence[float], realised: Sequence[float]) -> dict[str, float | None]:
    quality: dict[str, float | None] = without_nan(
        {
            "pearson": pearson(predicted, realised),
            "brier": mean_squared_error(predicted, realised),
            "brier_skill": brier_skill(predicted, realised),
            "bias": bias(predicted, realised),
        }
    )
    return quality


def _advantage_variance(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> dict[str, float | None]:
    """Return the mean of (r − b)² for the baselines used, and for other baselines on the same rewards."""
    rewards = rewards_of(kept)
    have_siblings = all(r.size > 1 for r in rewards)
    return {
        "used": None if baselines.uses_critic else _mean_square(rewards, baselines.baselines),
        "none": _mean_square(rewards, [np.zeros_like(r) for r in rewards]),
        "rloo": _mean_square(rewards, [mean_of_others(r) for r in rewards]) if have_siblings else None,
        "batch_mean": _mean_square(rewards, batch_mean(rewards)) if have_siblings or len(rewards) > 1 else None,
    }


def _advantage_variance_by_domain(
    kept: Sequence[ScoredGroup], baselines: StepBaselines
) -> dict[str, dict[str, float | None]]:
    """Return the same for each domain with a probe. `batch_mean` still averages over all prompts of the step."""
    rewards = rewards_of(kept)
    domains = sorted({item.domain for index, item in enumerate(kept) if baselines.value(index) is not None})
    if not domains:
        return {}
    by_baseline = {
        "used": baselines.baselines,
        "none": [np.zeros_like(r) for r in rewards],
        "rloo": [mean_of_others(r) for r in rewards],
        "batch_mean": batch_mean(rewards),
    }
    inside = {domain: [i for i, item in enumerate(kept) if item.domain == domain] for domain in domains}
    return {
        domain: {
            name: _mean_square([rewards[i] for i in indices], [each[i] for i in indices])
            for name, each in by_baseline.items()
        }
        for domain, indices in inside.items()
    }


def _zero_advantage_share(kept: Sequence[ScoredGroup], baselines: StepBaselines) -> float | None:
    """Return the share of groups whose advantages are all zero; None if a critic computes advantages."""
    if baselines.uses_critic:
        return None
    nonzero = [np.abs(baselines.advantages(i, item.rewards)).max() > _ROUNDING for i, item in enumerate(kept)]
    return 1 - float(np.mean(nonzero))


def _mean_square(rewards: Sequence[Floats], baselines: Sequence[Floats]) -> float:
    return float(np.mean((np.concatenate(rewards) - np.concatenate(baselines)) ** 2, dtype=np.float64))


def _mean_by_domain(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    by_domain: dict[str, list[Floats]] = {}
    for item in groups:
        by_domain.setdefault(item.domain, []).append(item.rewards)
    return {domain: float(np.concatenate(rewards).mean()) for domain, rewards in sorted(by_domain.items())}
