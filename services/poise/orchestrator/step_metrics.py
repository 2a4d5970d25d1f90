"""What is shown of a step: the numbers of its line in metrics.jsonl.

Pure. Knows neither services nor files. Shapes: n siblings of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from poise.algorithms.baselines import batch_mean, mean_of_others
from poise.algorithms.prediction_quality import bias, brier_skill, mean_squared_error, pearson
from poise.orchestrator.sampling.step_arithmetic import ScoredGroup, StepBaselines, rewards_of
from poise_client.types import Floats, StepResult

_NOTHING = 1e-6
"""Advantages up to it are rounding."""


def step_numbers(
    sampled: Sequence[ScoredGroup], scored: Sequence[ScoredGroup], baselines: StepBaselines, policy_version: int
) -> dict[str, Any]:
    """Return what metrics.jsonl says of the rollouts of a step, sampled for version `policy_version`.

    Rewards, tokens and ages are those of all that was sampled; baselines and advantages of what is trained on.
    """
    rollouts = [rollout for item in sampled for rollout in item.group.rollouts]
    lengths = [rollout.token_ids.size for rollout in rollouts]
    ages = [policy_version - min(span.policy_version for span in rollout.version_spans) for rollout in rollouts]
    predicted, realised, domains = predictions(scored, baselines)
    return {
        "reward": {
            "mean": float(np.concatenate(rewards_of(sampled)).mean()),
            "by_domain": {name: float(value) for name, value in _mean_by_domain(sampled).items()},
        },
        "baseline": {
            "source": baselines.source,
            "probe_share": len(predicted) / sum(item.rewards.size for item in scored),
            "probe_version": dict(baselines.probe_versions),
            "probe_settled": baselines.settled,
            **_quality(predicted, realised),
            "by_domain": {
                domain: _quality(*_of_domain(domain, predicted, realised, domains)) for domain in sorted(set(domains))
            },
        },
        "advantage_variance": _advantage_variance(scored, baselines)
        | {"by_domain": _variances_by_domain(scored, baselines)},
        "zero_advantage_share": _zero_advantage_share(scored, baselines),
        "response_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths), "total": sum(lengths)},
        "staleness": {"mean": float(np.mean(ages)), "max": max(ages)},
        "num_groups": len(sampled),
        "num_kept_groups": len(scored),
        "num_rollouts": len(rollouts),
    }


def _variances_by_domain(scored: Sequence[ScoredGroup], baselines: StepBaselines) -> dict[str, dict[str, float | None]]:
    """Return the same of each domain that had a probe; of `batch_mean`, over all prompts of the step."""
    rewards = rewards_of(scored)
    answered = sorted({item.domain for index, item in enumerate(scored) if baselines.value(index) is not None})
    if not answered:
        return {}
    by_baseline = {
        "used": baselines.baselines,
        "none": [np.zeros_like(r) for r in rewards],
        "rloo": [mean_of_others(r) for r in rewards],
        "batch_mean": batch_mean(rewards),
    }
    inside = {domain: [i for i, item in enumerate(scored) if item.domain == domain] for domain in answered}
    return {
        domain: {
            name: _mean_square([rewards[i] for i in indices], [each[i] for i in indices])
            for name, each in by_baseline.items()
        }
        for domain, indices in inside.items()
    }


def predictions(scored: Sequence[ScoredGroup], baselines: StepBaselines) -> tuple[list[float], list[float], list[str]]:
    """Return, where there was a probe, its value of each rollout, the mean reward of the siblings, and the domain."""
    predicted: list[float] = []
    realised: list[float] = []
    domains: list[str] = []
    for index, item in enumerate(scored):
        values_n = baselines.value(index)
        if values_n is not None:
            predicted += values_n.tolist()
            realised += mean_of_others(item.rewards).tolist()
            domains += [item.domain] * len(values_n)
    return predicted, realised, domains


def _of_domain(
    domain: str, predicted: Sequence[float], realised: Sequence[float], domains: Sequence[str]
) -> tuple[list[float], list[float]]:
    inside = [index for index, name in enumerate(domains) if name == domain]
    return [predicted[index] for index in inside], [realised[index] for index in inside]


def _quality(predicted: Sequence[float], realised: Sequence[float]) -> dict[str, float | None]:
    return {
        "pearson": finite_or_none(pearson(predicted, realised)),
        "brier": finite_or_none(mean_squared_error(predicted, realised)),
        "brier_skill": finite_or_none(brier_skill(predicted, realised)),
        "bias": finite_or_none(bias(predicted, realised)),
    }


def learner_numbers(result: StepResult) -> dict[str, Any]:
    """Return what metrics.jsonl says of the learner's answer."""
    metrics = {name: getattr(result.metrics, name) for name in type(result.metrics).__dataclass_fields__}
    metrics["staleness"] = {str(age): count for age, count in result.metrics.staleness.items()}
    rejected: dict[str, int] = {}
    for _, reason in result.rejected:
        rejected[reason] = rejected.get(reason, 0) + 1
    finite = {name: finite_or_none(v) if isinstance(v, float) else v for name, v in metrics.items()}
    numbers = {"policy_version": result.policy_version, "num_rejected": rejected, "learner": finite}
    if ages := result.metrics.staleness:  # of what was trained on, when it was: newer weights came since it was sampled
        mean = sum(age * count for age, count in ages.items()) / sum(ages.values())
        numbers["staleness"] = {"mean": mean, "max": max(ages)}
    return numbers


def finite_or_none(value: float) -> float | None:
    """Return the value; None where JSON has no word for it."""
    return value if np.isfinite(value) else None


def _advantage_variance(scored: Sequence[ScoredGroup], baselines: StepBaselines) -> dict[str, float | None]:
    """Return the mean squared r − b: of the baselines in use and, on the same rewards, of others; None without them."""
    rewards = rewards_of(scored)
    have_siblings = all(r.size > 1 for r in rewards)
    return {
        "used": None if baselines.by_critic else _mean_square(rewards, baselines.baselines),
        "none": _mean_square(rewards, [np.zeros_like(r) for r in rewards]),
        "rloo": _mean_square(rewards, [mean_of_others(r) for r in rewards]) if have_siblings else None,
        "batch_mean": _mean_square(rewards, batch_mean(rewards)) if have_siblings or len(rewards) > 1 else None,
    }


def _zero_advantage_share(scored: Sequence[ScoredGroup], baselines: StepBaselines) -> float | None:
    """Return the share of groups none of whose rollouts has an advantage; None where the critic makes them."""
    if baselines.by_critic:
        return None
    teaches = [np.abs(baselines.advantages(i, item.rewards)).max() > _NOTHING for i, item in enumerate(scored)]
    return 1 - float(np.mean(teaches))


def _mean_square(rewards: Sequence[Floats], baselines: Sequence[Floats]) -> float:
    return float(np.mean((np.concatenate(rewards) - np.concatenate(baselines)) ** 2, dtype=np.float64))


def _mean_by_domain(scored: Sequence[ScoredGroup]) -> Mapping[str, float]:
    by_domain: dict[str, list[Floats]] = {}
    for item in scored:
        by_domain.setdefault(item.domain, []).append(item.rewards)
    return {domain: float(np.concatenate(rewards).mean()) for domain, rewards in sorted(by_domain.items())}
